"""Command-line text to stages."""

from __future__ import annotations

import pytest

from fixtures import stages
from harness.errors import SpecError
from harness.meta import meta
from harness.relearning import dimra, malicious
from harness.unlearning import esd, uce

PRESETS = {"unlearning": {"esd": {"steps": 7, "lr": 0.5}}, "meta": {"meta": {"tau": 0.25}}, "relearning": {"dimra": {"batch": 9}}}


def test_a_plain_method_is_one_stage() -> None:
    """With its preset and the replicate's seed."""
    assert stages.unlearning("esd:eta=3", PRESETS, 2) == (esd.Method(steps=7, lr=0.5, eta=3.0, seed=2),)


def test_meta_around_a_method_with_a_loss_is_one_stage() -> None:
    """Own fields, `base.` fields, both presets, and the base's steps and rate unless written."""
    (found,) = stages.unlearning("meta-esd:gamma_2=.1:base.eta=3:base.trains=u", PRESETS, 2)
    assert found == meta.Method.around(esd.Method(steps=7, lr=0.5, eta=3.0, trains="u", seed=2), gamma_2=0.1, tau=0.25)
    (written,) = stages.unlearning("meta-esd:steps=5", PRESETS)
    assert (written.steps, written._stage().steps) == (5, 5)


def test_meta_after_a_closed_form_is_a_second_stage() -> None:
    """UCE has no loss: first UCE itself, as without meta, then the meta term alone."""
    first, second = stages.unlearning("meta-uce:steps=5:base.ridge=2", PRESETS, 1)
    assert first == uce.Method(ridge=2.0, seed=1)
    assert second == meta.Method(None, steps=5, tau=0.25, seed=1)


def test_an_attack_takes_its_data_from_the_name_and_its_steps_from_the_grid() -> None:
    """Without a data set, the class's own default."""
    assert stages.relearning("dimra-auxiliary:lr=0.1", PRESETS, 30, 4) == dimra.Attack(data="auxiliary", lr=0.1, batch=9, steps=30, seed=4)
    assert stages.relearning("malicious", {}) == malicious.Attack()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("meta-esd:base=uce", "the base method stands in the name"),
        ("meta-esd:gama_2=1", "unknown field of 'meta' 'gama_2'"),
        ("meta-esd:base.etta=1", "unknown field of 'esd' 'etta'"),
        ("meta-esd:inner=adam:order=exact", "take inner=sgd or order=first"),
    ],
)
def test_a_wrong_field_is_refused(text: str, message: str) -> None:
    """The error names the field and the stage that has none of it."""
    with pytest.raises(SpecError, match=message):
        stages.unlearning(text, {})


@pytest.mark.parametrize(("text", "message"), [("dimra-retian", "dimra:data must be retain or auxiliary, got 'retian'"), ("unlearndiffatk-x", "data")])
def test_a_data_set_that_an_attack_does_not_have_is_refused(text: str, message: str) -> None:
    """DiMRA has two assumptions, an attack on prompts has no data."""
    with pytest.raises(SpecError, match=message):
        stages.relearning(text, {})
