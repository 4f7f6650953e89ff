"""`--diagnose`: gradients at the unlearned weights of a real model, through the store, beside the measured rise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fixtures import diagnosis
from fixtures.options import Cell
from harness import measurement, pipeline
from harness.engine import Engine
from harness.finetuning.full import Finetune
from harness.spec import Lineage
from harness.store import Store
from harness.unlearning.ga import Method
from tests import tiny

CELL = Cell("stays-forgotten", "ga", "full-in", 2, "x")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the diagnosis needs of a lab, on a tiny random model that a strong ascent has hurt."""
    monkeypatch.setattr(diagnosis, "COUNT", 4)
    engine = Engine(Store(tmp_path / "store"))
    base = Lineage(pipeline.identify(str(tiny.save(tmp_path / "model"))), tiny.task())
    before = base.then(Method(steps=3, lr=1e-2, batch=2, images_per_prompt=1))
    after = before.then(Finetune(steps=2, batch=2, images_per_prompt=1, lr=1e-3))
    loss = lambda lineage, data: measurement.held_out_loss(engine, lineage, data).tolist()  # noqa: E731  # a lab has it as a method
    return SimpleNamespace(
        engine=engine, task=base.task, base=base, parent=lambda cell: before, lineage=lambda cell: after, require=lambda lineage: lineage, loss=loss
    )


def test_a_diagnosis_is_made_once_and_told_by_name(lab: Any) -> None:
    """Prediction, alignment with its interval, overlap, gap, and the three parts that carried most; a second look reads the store."""
    found = diagnosis.diagnosis(lab, CELL, 0.4)
    passes = lab.engine.cost()["unet_passes"]
    assert found["measured"] == 0.4
    assert found["gap"] > 0
    assert found["alignment_low"] <= found["alignment_high"]
    assert -1 <= found["alignment"] <= 1
    assert 0 <= found["overlap"] <= 1
    assert len([name for name in found if name.startswith("carried by")]) == diagnosis.FIRST
    assert diagnosis.diagnosis(lab, CELL, 0.4) == found
    assert lab.engine.cost()["unet_passes"] == passes


def test_the_prediction_is_the_share_of_the_gap(lab: Any) -> None:
    """Signature: RS is a step of plain descent over the gap: twice the learning rate of one step predicts twice as much."""
    after = lab.lineage(CELL)
    one = diagnosis.diagnosis(lab, replace(CELL, steps=1), 0.0)
    lab.lineage = lambda cell: after.parent.then(replace(after.stages[-1], lr=2e-3))
    assert diagnosis.diagnosis(lab, replace(CELL, steps=1), 0.0)["predicted"] == pytest.approx(2 * one["predicted"], rel=1e-3)


def test_twice_the_gap_is_half_the_share(lab: Any) -> None:
    """Signature: the prediction is a share of what unlearning did to the loss, so a gap twice as wide leaves half of it."""
    one, loss = diagnosis.diagnosis(lab, CELL, 0.0), lab.loss
    lab.loss = lambda lineage, data: [2 * value for value in loss(lineage, data)]
    two = diagnosis.diagnosis(lab, CELL, 0.0)
    assert two["gap"] == pytest.approx(2 * one["gap"])
    assert two["predicted"] == pytest.approx(one["predicted"] / 2, rel=1e-6)


def test_without_a_gap_nothing_is_predicted(lab: Any) -> None:
    """A model whose loss on the concept unlearning did not raise has no gap to close; the rest is told."""
    lab.parent = lambda cell: lab.base
    found = diagnosis.diagnosis(lab, CELL, 0.0)
    assert "predicted" not in found
    assert found["gap"] == 0
    assert {"alignment", "overlap", "chance"} <= set(found)


def test_numbers_keep_their_names() -> None:
    """What the store holds is read back in the order in which it was written."""
    from harness.diagnosis.overlap import PARTS, Overlap

    carried = {name: float(i) for i, name in enumerate(PARTS)}
    found = diagnosis.told(diagnosis.packed(Overlap(0.1, 0.2, 0.3, 0.4, 0.5, {7: 0.6}, carried)), 1.0, 0.9)
    head = {"measured": 0.9, "gap": 1.0, "alignment": 0.1, "alignment_low": 0.2, "alignment_high": 0.3, "overlap": 0.4, "chance": 0.5, "predicted": 0.6}
    assert found == head | {f"carried by {name}": carried[name] for name in PARTS[:-4:-1]}
    assert diagnosis.packed(Overlap(0, 0, 0, 0, 0, {1: 0}, carried)).dtype == torch.float64
