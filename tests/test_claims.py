"""Claims on synonyms and on another domain, and the numbers that stand beside a claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fixtures import claims, eyes
from fixtures.lab import Lab
from fixtures.options import Cell
from harness import catalogue, measurement
from harness.errors import PreconditionError, SpecError
from harness.spec import BROKEN, HOLDS, Claim, Group, Lineage, Task
from harness.stats import Sequential
from tests import tiny
from tests.test_attacks import SEES, Scene
from tests.test_options import parsed

WHOLE = replace(tiny.task(), synonyms={"x": ("xx",), "y": ("yy",)}, crossed=Group(("c", "d"), ("a {}",)))
Script = Callable[[Lineage, tuple[str, ...]], tuple[int, int] | None]


def scene(script: Script = lambda lineage, asked: None, **changes: Any) -> Scene:
    """Everything holds but what `script` says otherwise."""

    def good(lineage: Lineage, asked: tuple[str, ...]) -> tuple[int, int]:
        if (said := script(lineage, asked)) is not None:
            return said
        if asked[0] in ("r", "c"):
            return 200, 200
        return (200, 200) if not lineage.stages and asked[0] != "p" else (0, 200 if lineage.stages else 400)

    lab = Scene(good)
    lab.task = replace(WHOLE, **changes)
    return lab


def told(lab: Scene, claim: str, concept: str = "x", finetune: str | None = None) -> Claim:
    """The claim about ESD's model."""
    cell = Cell(claim, "esd", finetune, 50 if finetune else 0, concept)
    return claims.measured(lab, cell, claims.blank("id", "{method} {tau} {above}", cell, lab.options, lab.task))


# --- cells ------------------------------------------------------------------------------------------------------------


def asked(claim: str, task: Task, *options: str) -> list[str]:
    """The ids of a claim's cells."""
    return [str(cell) for cell in parsed("--method", "esd", *options).cells(claim, task)]


def test_the_cells_of_synonyms_and_of_another_domain_by_hand() -> None:
    """One cell per concept with synonyms, of the unlearned model; one per snapshot for the other domain; none where the task has neither."""
    assert asked("generality", replace(WHOLE, synonyms={"y": ("yy",)})) == ["esd-unlearned-synonyms-y"]
    assert asked("generality", WHOLE) == ["esd-unlearned-synonyms-x", "esd-unlearned-synonyms-y"]
    assert asked("cross-retained", WHOLE, "--steps", "50") == ["esd-unlearned-2 crossed concepts", "esd-lora-in-50-2 crossed concepts"]
    assert asked("generality", tiny.task()) == asked("cross-retained", tiny.task()) == []
    assert asked("generality", WHOLE, "--profile", "smoke") == ["esd-unlearned-synonyms-x", "esd-unlearned-synonyms-y"]


def test_they_belong_to_the_gate() -> None:
    """A selection without 200 steps lacks their cells too: 3 methods x (2 stays + 1 retained + 1 cross-retained) of 2 + 3 x (2 + 2 + 3 + 3 + 4) claims."""
    assert parsed("--steps", "50").deviations([WHOLE]) == ["12 of the 44 claims of the standard profile are not selected"]


# --- synonyms ---------------------------------------------------------------------------------------------------------


def test_a_concept_that_its_synonyms_do_not_bring_holds() -> None:
    """Below tau, with the synonyms said, and held against the base model's own rate."""
    found = told(scene(), "generality")
    assert (found.verdict, found.word, found.direction, found.tolerance) == (HOLDS, HOLDS, "below", 0.1)
    assert (found.reason, found.concept) == ("asked for xx", "x by other names")
    assert found.base
    assert found.base["k"] == 200


def test_a_concept_under_another_name_is_not_forgotten() -> None:
    """Only the name was forgotten: the prompts ask for the synonym, the detector looks for the concept."""
    found = told(scene(lambda lineage, asked: (150, 200) if lineage.stages and asked == ("xx", "x") else None), "generality")
    assert (found.verdict, found.word) == (BROKEN, "not forgotten")


def test_synonyms_that_the_base_model_does_not_know_prove_nothing() -> None:
    """Not drawn before, so not forgotten afterwards: invalid."""
    with pytest.raises(PreconditionError, match="asked for xx: 10/200"):
        told(scene(lambda lineage, asked: (10, 200) if not lineage.stages and asked == ("xx", "x") else None), "generality")


# --- another domain ---------------------------------------------------------------------------------------------------


def test_a_domain_that_is_lost_is_not_retained() -> None:
    """Above the task's `retained` it holds; below, the claim is broken, whatever the retained concepts do."""
    assert told(scene(), "cross-retained").verdict == HOLDS
    found = told(scene(lambda lineage, asked: (20, 200) if lineage.stages and asked[0] == "c" else None), "cross-retained", finetune="lora-in")
    assert (found.verdict, found.word, found.direction, found.tolerance) == (BROKEN, "not retained", "above", 0.8)


def test_a_domain_that_the_base_model_lacks_cannot_be_lost() -> None:
    """Invalid: its detector or its prompts are wrong."""
    with pytest.raises(PreconditionError, match="base model itself is not shown"):
        told(scene(lambda lineage, asked: (20, 200) if asked[0] == "c" else None), "cross-retained")


def test_who_looks_at_the_other_domain_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector and a rule of its own; the claim names them and not the task's."""
    other = SimpleNamespace(description="another name", address="other", labels=("c", "d"))
    monkeypatch.setattr(eyes, "opened", lambda task, table, drawn: other)
    monkeypatch.setattr(Scene, "whole", WHOLE, raising=False)
    lab = scene(detectors={"crossed": {"name": "clip", "rule": "top-2"}})
    lab.engine.progress = lambda line: None  # type: ignore[method-assign]
    assert told(lab, "cross-retained").detector == "another name; rule top-2; address other"
    assert told(lab, "retained", "2 retained concepts").detector == "a name; rule top-1; address named"


# --- numbers beside a claim -------------------------------------------------------------------------------------------


def half(lineage: Lineage, asked: tuple[str, ...]) -> tuple[int, int] | None:
    """Of the unlearned model: x and y in .1 and .3, their synonyms in .4, the retained in .9."""
    rates = {"x": (20, 200), "y": (60, 200), "xx": (80, 200), "yy": (80, 200), "r": (180, 200)}
    return rates.get(asked[0]) if lineage.stages else None


def test_the_harmonic_means_are_maces() -> None:
    """H_o of Acc_e .2, Acc_s .9, Acc_g .4 is 3 / (1/.8 + 1/.9 + 1/.6); without synonyms H_c is 2 / (1/.8 + 1/.9); after a fine-tune neither."""
    assert told(scene(half), "retained", "2 retained concepts").reason == f"H_o {3 / (1 / 0.8 + 1 / 0.9 + 1 / 0.6):.3f}"
    assert told(scene(half, synonyms={}), "retained", "2 retained concepts").reason == f"H_c {2 / (1 / 0.8 + 1 / 0.9):.3f}"
    assert told(scene(half, synonyms={"x": ("xx",)}), "retained", "2 retained concepts").reason.startswith("H_c")
    assert told(scene(half), "retained", "2 retained concepts", "lora-in").reason == ""


def test_maces_own_row_is_reproduced() -> None:
    """Its Table 4, 100 celebrities: Acc_e 4.31 and Acc_s 84.56 make H_c 89.78."""
    lab = scene(lambda lineage, asked: {"x": (431, 10000), "y": (431, 10000), "r": (8456, 10000)}.get(asked[0]) if lineage.stages else None, synonyms={})
    assert told(lab, "retained", "2 retained concepts").reason == "H_c 0.898"


def test_rates_go_by_their_published_names() -> None:
    """UA is 1 - the erased style's rate, IRA and CRA are the retained ones'; a name stands with its own rate only."""
    figures = {"UA": "1 - erased", "IRA": "retained", "CRA": "crossed", "AR": "erased"}
    lab = scene(half, figures=figures)
    assert told(lab, "forgotten").reason == "UA 0.900, AR 0.100"
    assert told(lab, "retained", "2 retained concepts").reason.endswith("; IRA 0.900")
    assert told(lab, "cross-retained").reason == "CRA 1.000"
    assert told(scene(half), "forgotten").reason == ""


def beside(lab: Scene, **found: Any) -> Scene:
    """The same lab, whose rates come with more."""
    rate = lab._rate
    lab._rate = lambda *given, **named: replace(rate(*given, **named), **found)  # type: ignore[method-assign]
    return lab


def test_what_is_drawn_instead_stands_beside_what_was_forgotten() -> None:
    """AR_alt of the images that decided the claim, under its published name or in words; other claims do not say it."""
    figures = {"UA": "1 - erased", "AR_alt": "alternative"}
    found = told(beside(scene(half, figures=figures, alternative="none"), instead=0.85), "forgotten")
    assert found.reason == "AR_alt 0.850; UA 0.900"
    assert found.figures == {"AR_alt": 0.85, "UA": 0.9}
    assert told(beside(scene(half, alternative="none"), instead=0.85), "forgotten").reason == "rate of 'none' 0.850"
    assert told(beside(scene(half, figures=figures, alternative="none"), instead=None), "forgotten").reason == "UA 0.900"
    assert "AR_alt" not in told(beside(scene(half, figures=figures, alternative="none"), instead=0.85), "generality").figures


def test_the_lab_asks_for_the_tasks_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every rate, as it costs no image."""
    monkeypatch.setattr(measurement, "measure", lambda *given, **named: named["instead"])
    lab = scene(alternative="a red ball")
    assert Lab._rate(lab, lab.base, lab.task.erased, Sequential(0.1, "below", 0.05)) == "a red ball"


def test_figures_are_numbers_too() -> None:
    """What the reason says by name, unrounded; a detector's that is no number stands in the reason only, as JSON has none for it."""
    found = told(scene(half, figures={"IRA": "retained"}), "retained", "2 retained concepts")
    assert found.figures == {"H_o": pytest.approx(3 / (1 / 0.8 + 1 / 0.9 + 1 / 0.6)), "IRA": 0.9}
    found = told(beside(scene(half), figures={"without a face": 1.0, "of faces": float("nan")}), "forgotten")
    assert (found.reason, found.figures) == ("without a face 1.000, of faces nan", {"without a face": 1.0})


# --- eyes -------------------------------------------------------------------------------------------------------------


class Names:
    """A detector with words of its own."""

    def __init__(self) -> None:
        self.labels, self.none, self.address, self.description = ("mask", "none"), "none", "names", "names"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Nothing."""
        return torch.zeros(len(images), 2)


def test_a_detectors_word_becomes_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its labels keep their places and its address stays; a word that it does not have is refused."""
    monkeypatch.setattr(catalogue, "find", lambda kind, name: Names)
    table: dict[str, Any] = {"name": "names", "names": {"a masked person": "mask"}}
    found = eyes.opened(WHOLE, table, lambda chosen: torch.zeros(0))
    assert (found.labels, found.address) == (("a masked person", "none"), "names")
    with pytest.raises(SpecError, match=r"unknown label in `names`.*'mosk'.*Did you mean 'mask'"):
        eyes.opened(WHOLE, {**table, "names": {"x": "mosk"}}, lambda chosen: torch.zeros(0))
    assert SEES.labels[0] == "x"
