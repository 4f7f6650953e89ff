"""Unlearning losses along a trajectory, on one probe."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.diagnosis.curve import snapshots, unlearning_loss
from harness.engine import Engine
from harness.errors import SpecError
from harness.relearning.dimra import Attack
from harness.spec import Base, Lineage
from harness.store import Store
from harness.unlearning import dimum, esd, uce
from tests import tiny

ESD = esd.Method(steps=12, lr=3e-3, batch=2, sampler_steps=1, trains="x", x_t_from="frozen")


def test_the_curve_falls_along_unlearning_and_is_kept(base: Base, tmp_path: Path) -> None:
    """ESD's residual on the probe is lower after 12 steps than after 1, starts above it all at the base, and the second look costs no pass."""
    engine = Engine(Store(tmp_path))
    unlearned = Lineage(base, tiny.task(), (ESD,))
    models = [unlearned.parent, *snapshots(unlearned, [1, 12])]
    curve = unlearning_loss(engine, unlearned, models, draws=4)
    assert curve[0] > curve[1] > curve[2]
    passes = engine.cost()["unet_passes"]
    assert unlearning_loss(engine, unlearned, models, draws=4) == curve
    assert engine.cost()["unet_passes"] == passes


def test_the_curve_goes_on_under_an_attack(base: Base, tmp_path: Path) -> None:
    """A method with data: DiMUM's loss at its own end and two snapshots into DiMRA, three finite numbers that differ."""
    engine = Engine(Store(tmp_path))
    unlearned = Lineage(base, tiny.task(), (dimum.Method(steps=2, lr=1e-3, batch=2, images_per_prompt=1),))
    attacked = unlearned.then(Attack(steps=2, lr=1e-3, batch=2, images_per_prompt=1))
    curve = unlearning_loss(engine, unlearned, [unlearned, *snapshots(attacked, [1, 2])], draws=2)
    assert len(set(curve)) == 3


@pytest.mark.parametrize(
    ("grid", "message"), [([], "rising whole numbers"), ([2, 1], "rising"), ([1, 1], "rising"), ([0, 1], "rising"), ([4, 19], "ends after 12 steps.*at 19")]
)
def test_a_grid_lies_within_the_trajectory(grid: list[int], message: str) -> None:
    """Empty, falling, doubled, or beyond the last step: refused."""
    with pytest.raises(SpecError, match=message):
        snapshots(Lineage(Base("d", ""), tiny.task(), (ESD,)), grid)


def test_a_closed_form_has_no_curve(tmp_path: Path) -> None:
    """UCE is solved and has no loss along the way."""
    lineage = Lineage(Base("d", ""), tiny.task(), (uce.Method(),))
    with pytest.raises(SpecError, match="has no loss to record"):
        unlearning_loss(Engine(Store(tmp_path)), lineage, [lineage])
