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
    """Prediction, alignment and orthogonal term with their intervals, overlap, gap, and the three parts that carried most; a second look reads the store."""
    found = diagnosis.diagnosis(lab, CELL, 0.4)
    passes = lab.engine.cost()["unet_passes"]
    assert found["measured"] == 0.4
    assert found["gap"] > 0
    assert found["alignment_low"] <= found["alignment_high"]
    assert -1 <= found["alignment"] <= 1
    assert 0 <= found["overlap"] <= 1
    assert -1 <= found["orthogonal_low"] <= found["orthogonal"] <= found["orthogonal_high"] <= 1
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


@pytest.mark.parametrize("asked", [True, False])
def test_a_resurgence_claim_carries_its_diagnosis(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --diagnose the claim has the prediction beside the rise from 4 to 60 of 200; without it nothing is computed."""
    from tests.test_attacks import Scene, good, told, with_

    rates = {1: (4, 200), 2: (60, 200)}  # unlearned, fine-tuned
    scene = Scene(with_(lambda lineage, asked: rates.get(len(lineage.stages)) if asked[0] == "x" else good(lineage, asked)))
    scene.options = replace(scene.options, diagnose=asked)
    monkeypatch.setattr(scene, "sensitive", lambda cell: None)
    monkeypatch.setattr(diagnosis, "diagnosis", lambda lab, cell, rise: {"measured": rise, "predicted": 0.2})
    found = told(scene, replace(CELL, method="uce", finetune="lora-in", attack=None))
    assert found.word == "resurged"
    assert found.diagnosis == ({"measured": pytest.approx(0.28), "predicted": 0.2} if asked else {})


def test_an_attack_records_the_unlearning_loss(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --diagnose a DiMRA claim has the method's own loss of the base model, the unlearned one and each snapshot, in this order; a closed form has none."""
    from harness.unlearning import uce
    from tests.test_attacks import Scene, about, good, told

    lab.snapshots = lambda cell, parent: [lab.lineage(cell)]
    seen: list[Lineage] = []
    monkeypatch.setattr(diagnosis, "unlearning_loss", lambda engine, unlearned, models: seen.extend(models) or [i / 10 for i in range(len(models))])
    losses = diagnosis.unlearning_losses(lab, CELL)
    assert losses == {"unlearning loss of the base model": 0.0, "unlearning loss when unlearned": 0.1, "unlearning loss after 2 steps": 0.2}
    assert seen == [lab.base, lab.parent(CELL), lab.lineage(CELL)]
    lab.parent = lambda cell: lab.base.then(uce.Method())
    assert diagnosis.unlearning_losses(lab, CELL) == {}
    scene, cell = Scene(good), about("withstands-dimra")
    assert told(scene, cell).diagnosis == {}
    scene.options = replace(scene.options, diagnose=True)
    assert list(told(scene, cell).diagnosis.values()) == [0.0, 0.1, 0.2, 0.3]  # two snapshots
    assert seen[3:] == [scene.base, scene.parent(cell), *scene.snapshots(cell, scene.parent(cell))]


def test_numbers_keep_their_names() -> None:
    """What the store holds is read back in the order in which it was written; what there is not is left out."""
    from harness.diagnosis.overlap import PARTS, Overlap

    carried = {name: float(i) for i, name in enumerate(PARTS)}
    head = {"gap": 1.0, "alignment": 0.1, "alignment_low": 0.2, "alignment_high": 0.3, "overlap": 0.4, "chance": 0.5, "predicted": 0.6}
    term = {"orthogonal": 0.7, "orthogonal_low": 0.8, "orthogonal_high": 0.9}
    without = Overlap(0.1, 0.2, 0.3, 0.4, 0.5, {7: 0.6}, carried)
    parts = {f"carried by {name}": share for name, share in carried.items()}
    assert diagnosis.told(diagnosis.packed(replace(without, orthogonal=(0.7, 0.8, 0.9))), 1.0) == head | term | parts
    assert diagnosis.told(diagnosis.packed(without), 1.0) == head | parts
    assert diagnosis.packed(without).dtype == torch.float64


def test_the_parts_that_are_told_carried_most(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three, the largest first."""
    shares = {"carried by a": 0.1, "carried by b": 0.5, "carried by c": -0.3, "carried by d": 0.4, "carried by e": 0.3}
    monkeypatch.setattr(diagnosis, "diagnoses", lambda lab, cells: [{"gap": 1.0, **shares}])
    assert list(diagnosis.diagnosis(lab, CELL, 0.2)) == ["measured", "gap", "carried by b", "carried by d", "carried by e"]


def test_cells_of_one_model_share_their_gradients(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two concepts under one fine-tune take four sets of gradients, not six; each cell's numbers are what it gets alone, and a half-done run goes on."""
    cells, done = [CELL, replace(CELL, concept="y")], list[int]()
    alone = [diagnosis.diagnoses(lab, [cell])[0] for cell in cells]
    lab.engine = Engine(Store(lab.engine.store.root.parent / "other"))
    lab.loss = lambda lineage, data: measurement.held_out_loss(lab.engine, lineage, data).tolist()
    true = diagnosis.gradients
    monkeypatch.setattr(diagnosis, "gradients", lambda *given: done.append(1) or true(*given))
    assert diagnosis.diagnoses(lab, cells[:1]) == alone[:1]
    assert len(done) == 3
    assert diagnosis.diagnoses(lab, cells) == alone
    assert len(done) == 6  # the second cell's alone
    after = lab.lineage(CELL)
    lab.lineage = lambda cell: after.parent.then(replace(after.stages[-1], lr=2e-3))
    diagnosis.diagnoses(lab, cells)
    assert len(done) == 10  # both at once: fine-tuning's and the retained's are shared
