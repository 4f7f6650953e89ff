"""A lab's detectors and rules, and what it wants to see before a rate means anything."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.lab import LOOKS, Lab
from fixtures.options import Cell
from harness import measurement
from harness.detection._rule import Rule
from harness.engine import Engine
from harness.errors import PreconditionError, ResurgenceError
from harness.spec import Base, Lineage, Task
from harness.stats import Sequential
from harness.store import Store
from tests import tiny

ROOT = Path(__file__).parents[1]
POCKET = Task.load(ROOT / "suites" / "celebrity" / "pocket.toml")
TUNED = Cell("stays-forgotten", "esd", "lora-in", 4, "x")


def lab(folder: Path, task: Task) -> Lab:
    """A lab on the pocket model with nothing selected."""
    options: Any = SimpleNamespace(model_of=lambda task: "pocket", candidate=None, applied=lambda each: each, cells=lambda claim, each: [])
    return Lab(options, task, Engine(Store(folder)))


# --- who looks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"detector": {"name": "gcd", "folder": "nowhere"}}, "'nowhere'"),
        ({"detector": {"name": "classifier", "folder": "pocket", "rule": "top-x"}}, "top-x"),
        ({"detector": {"name": "classifier", "folder": "pocket-style"}}, "cannot see '"),
        ({"detectors": {"retained": {"name": "classifier", "folder": "pocket-style"}}}, f"cannot see '{sorted(POCKET.retained.concepts)[0]}'"),
        ({"detector": {"name": "gallery", "folder": "nowhere"}}, "'nowhere'"),
    ],
    ids=["no weights", "no rule", "other labels", "other labels for the retained", "gallery"],
)
def test_a_detector_that_cannot_look_is_told_before_anything_is_made(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """Weights, rule and labels: nothing is drawn or trained for a detector that will refuse."""
    with pytest.raises(ResurgenceError, match=says):
        lab(tmp_path, replace(POCKET, **change)).ready()
    assert not list(tmp_path.rglob("record.json"))


def test_a_gate_whose_detector_is_not_there_trains_nothing(tmp_path: Path) -> None:
    """Every claim is invalid for that reason and the store is empty: what is missing can be fetched before hours are spent."""
    own = tmp_path / "own.toml"
    own.write_text((ROOT / "suites/celebrity/pocket.toml").read_text().replace('folder = "pocket"', 'folder = "nowhere"'))
    command = [sys.executable, "-m", "pytest", "suites/celebrity", "-p", "no:cacheprovider", "--task", str(own), "--method", "uce", "-k", "forgotten"]
    command += ["--store", str(tmp_path / "store"), "--report", str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 11
    found = json.loads((tmp_path / "out" / "verdict.json").read_text())["claims"]
    assert {each["verdict"] for each in found} == {"invalid"}
    assert all("'nowhere'" in each["reason"] for each in found)
    assert not list(tmp_path.rglob("weights.safetensors"))


@pytest.mark.parametrize(
    "table", [{"name": "classifier", "folder": "pocket"}, {"name": "gallery", "folder": "pocket", "images": 6}], ids=["labels", "learns them"]
)
def test_a_detector_that_can_look_draws_nothing_yet(tmp_path: Path, table: dict[str, Any]) -> None:
    """A gallery's concepts are enrolled when somebody looks."""
    lab(tmp_path, replace(POCKET, detector=table)).ready()
    assert not list(tmp_path.rglob("record.json"))


def test_a_rule_is_read_as_its_detector_means_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each of several faces has its best label, labels share a rank, whoever looks."""
    monkeypatch.setattr(Lab, "_opened", lambda self, task, table: SimpleNamespace(several=table["name"] == "gcd"))
    faces, one = {"name": "gcd", "folder": ""}, {"name": "classifier", "folder": "pocket"}
    for tables in ({"detector": faces, "detectors": {"retained": one}}, {"detector": one, "detectors": {"retained": faces}}):
        made = lab(tmp_path, replace(POCKET, **tables))
        assert [made.eyes_of(role)[1].shared for role in ("", "retained")] == [tables["detector"] is faces, tables["detector"] is one]


def test_a_lab_that_is_not_ready_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second cell gets the same error, and nothing is loaded for it."""
    from fixtures import eyes

    made, tried = lab(tmp_path, replace(POCKET, detector={"name": "gcd", "folder": "nowhere"})), list[str]()
    real = eyes.made
    monkeypatch.setattr(eyes, "made", lambda task, table: tried.append(table["name"]) or real(task, table))
    for _ in range(2):
        with pytest.raises(ResurgenceError, match="'nowhere'"):
            made.ready()
    assert tried == ["gcd"]


def test_the_published_top_3_is_of_the_erased_concept_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The alternative is what is drawn instead, so it must be the likeliest; the same holds of its share among an erased concept's images."""
    asked = dict[str | None, Rule]()
    monkeypatch.setattr(measurement, "measure", lambda *args, **more: asked.setdefault(more["looked_for"], more["rule"]))
    task = replace(POCKET, detector={**POCKET.detector, "rule": "top-3"}, alternative="none")
    made = lab(tmp_path, task)
    gate = Sequential(0.1, "below", 0.05, 1, 20, 20)
    for looked_for in (None, "Tildeth Oskeby", "none"):
        made._rate(made.base, task.anchor, gate, looked_for=looked_for)
    assert asked == {None: Rule(3), "Tildeth Oskeby": Rule(3), "none": Rule(1)}


# --- what a fine-tune must have learned -------------------------------------------------------------------------------


def learning(drops: dict[int, float], asked: list[int]) -> Lab:
    """A lab whose fine-tune lowers the loss of each image by `drops`, which depends on how many it looks at, and by 1 more or less in turn."""
    made = Lab.__new__(Lab)
    made.task, made.base, made._memory = tiny.task(), Lineage(Base("d", ""), tiny.task()), {}

    def loss(lineage: Lineage, data: Any, least: int) -> list[float]:
        asked.append(least)
        return [9.0 if lineage == "before" else 9.0 - drops[least] + (-1) ** i for i in range(least)]

    made.loss = loss  # type: ignore[method-assign,assignment]
    made.parent, made.lineage = lambda cell: "before", lambda cell: "after"  # type: ignore[method-assign,assignment,return-value]
    return made


def test_a_clear_first_look_is_the_only_one() -> None:
    """A drop of .9, with a standard deviation of 1, is p = .00002 of 30 images."""
    asked = list[int]()
    learning({30: 0.9, 120: -9.0}, asked)._learns(TUNED)
    assert asked == [LOOKS[0]] * 2


def test_the_second_look_decides_where_the_first_is_too_small() -> None:
    """A drop of .3 is p = .06 of 30 images and .0006 of 120."""
    asked = list[int]()
    learning({30: 0.3, 120: 0.3}, asked)._learns(TUNED)
    assert asked == [30, 30, 120, 120]


def test_two_looks_share_alpha() -> None:
    """p = .03 is below .05 and not below half of it, on both looks."""
    with pytest.raises(PreconditionError, match=r"4 steps of lora-in did not lower the loss on held-out images.*p = 0.03.*: it learned nothing"):
        learning({30: 0.35, 120: 0.17}, [])._learns(TUNED)


def test_a_fine_tune_that_changes_nothing_learned_nothing() -> None:
    """Not even a difference to test."""
    made = learning({30: 0.0, 120: 0.0}, [])
    made.lineage = made.parent  # type: ignore[method-assign]
    with pytest.raises(PreconditionError, match="learned nothing"):
        made._learns(TUNED)
