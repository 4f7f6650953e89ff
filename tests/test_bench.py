"""`python -m harness bench`: the clock around a run, what is put beside the plan, and the table."""

from __future__ import annotations

import json
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fixtures import meter as module
from fixtures import planning
from fixtures.meter import BACKWARD, DETECTOR, LEARNING, LOOKING, OPTIMIZER, OTHER, Meter
from harness.__main__ import main
from harness.bench import command, gate, stages
from harness.bench.gate import Bench, Ran
from harness.engine import Engine
from harness.errors import PreconditionError, SpecError
from harness.finetuning import lora
from harness.plan import Cost
from harness.spec import ImageSet, Lineage
from harness.store import Store
from harness.unlearning import dimum, uce
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = tiny.task()
STEP = {"batch": 1, "images_per_prompt": 1}


# --- the clock -------------------------------------------------------------------------------------------------------


def test_what_runs_within_a_timed_call_is_that_calls(monkeypatch):
    """A pass within a backward pass adds no time of its own, but is counted; after an error the clock runs on."""
    ticks = count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = Meter()
    inner = found.timed("inner", lambda samples: len(samples), samples=True)
    outer = found.timed("outer", lambda: inner([1, 2, 3]))
    assert (outer(), inner([1, 2])) == (3, 2)
    with pytest.raises(TypeError):
        found.timed("outer", len)()
    assert (found.seconds, found.passes) == ({"outer": 2, "inner": 1}, {"inner": 5})


def metered(base: Any, folder: Path) -> tuple[dict[str, float], dict[str, int], int, float]:
    """A process of its own, as the clock stays: unlearn, draw, look; seconds, passes, the engine's passes, the whole time."""
    from fixtures import eyes

    found = Meter()
    module.install(found)
    started, engine = time.perf_counter(), Engine(Store(folder))
    engine.images(Lineage(base, TASK, (dimum.Method(steps=2, **STEP),)), (ImageSet(("a x",), (1,)), TASK.sampler))
    eyes.opened(TASK, {"name": "classifier", "folder": "pocket"}, lambda _: torch.zeros(0))(torch.zeros(1, 3, 32, 32))
    return dict(found.seconds), dict(found.passes), engine.cost()["unet_passes"], time.perf_counter() - started


def test_the_clock_stands_around_all_that_a_run_computes(base, tmp_path, child):
    """Every kind of call has its seconds, together no more than there were, and every UNet pass is counted as one that learns or one that looks."""
    seconds, passes, made, whole = child(metered, base, tmp_path).result()
    assert set(seconds) == {LOOKING, LEARNING, BACKWARD, OTHER, DETECTOR, OPTIMIZER}
    assert all(each > 0 for each in seconds.values())
    assert sum(seconds.values()) < whole
    assert passes == {LEARNING: 4, LOOKING: made - 4}  # DiMUM: two passes that learn a step
    assert made > 4


# --- single stages ---------------------------------------------------------------------------------------------------


def test_snapshots_together_and_apart(base, tmp_path):
    """One run to the longest costs its steps, four runs the sum of theirs; the weights are the same."""
    found = stages.compared(Lineage(base, TASK), lora.Finetune(**STEP), (1, 2, 4), tmp_path)
    assert (found["UNet passes, together"], found["UNet passes, apart"]) == (4, 7)
    assert found["the longest has the same weights"] is True
    assert [(row["passes together"], row["passes apart"]) for row in found["rows"]] == [(1, 1), (1, 2), (2, 4)]


def test_methods_beside_their_plan(base, tmp_path):
    """Passes of the stage alone, not of the images before it, equal the plan's; a method that fails is named and does not end the bench."""
    made = {"dimum": dimum.Method(steps=9, **STEP), "uce": uce.Method(), "broken": uce.Method(ridge=0.0, preserve=0.0)}
    found = stages.costs(Lineage(base, TASK), made, tmp_path, steps=2)
    rows = {row["method"]: row for row in found["rows"]}
    assert [rows["dimum"][name] for name in ("steps", "passes", "passes planned")] == [2, 4, 4]
    assert rows["dimum"]["images before"] > 0
    assert rows["uce"]["passes"] == rows["uce"]["passes planned"] == 0
    assert "singular" in rows["broken"]["seconds"]
    assert "singular" in "\n".join(command.lines("methods", found))


class Scripted:
    """Sees whom the first so many images of a set were asked for, and somebody else in the others."""

    address, labels = "scripted", ("x", "y", "r", "s")

    def __init__(self, *script: tuple[int, int]) -> None:
        self.script = iter(script)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Scores (n, 4): two prompts a concept, from the set's first label on."""
        first, right = next(self.script)
        place = torch.arange(len(images))
        return torch.nn.functional.one_hot((first + place // 2 % 2 + (place >= right)) % 4, 4).float()


def test_the_fewest_sampling_steps_that_keep_what_is_asked_for(base, tmp_path):
    """Erased and retained alike, each number of steps with images of its own, the task's own among them; .97 is not kept by 15 of 16."""
    eyes = Scripted((0, 8), (2, 7), (0, 8), (2, 8), (0, 8), (2, 8))
    found = stages.accuracies(Lineage(base, TASK), eyes, (3, 1), 2, tmp_path)
    assert [(row["steps"], row["images"], row["base accuracy"]) for row in found["rows"]] == [(1, 16, 15 / 16), (2, 16, 1.0), (3, 16, 1.0)]
    assert found["rows"][0]["low"] < 15 / 16 < found["rows"][0]["high"]
    assert (found["the fewest steps that keep 0.97"], found["the task's steps"], found["base accuracy at the task's steps"]) == (2, 2, 1.0)
    assert "1   target >= 0.97: met" in "\n".join(command.lines("sampling", found))
    none = stages.accuracies(Lineage(base, TASK), Scripted(*[(0, 0), (2, 0)] * 2), (1,), 1, tmp_path / "none")
    assert (none["the fewest steps that keep 0.97"], none["base accuracy at the task's steps"]) == (None, 0.0)


def test_every_preset_is_found():
    """The bench's methods are those of the folder, with the pocket model's steps."""
    assert stages.presets("unlearning", "esd").steps == 150
    assert stages.presets("finetuning", "lora").lr == 2e-3


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_plan_is_read_off_its_sum(tmp_path, monkeypatch):
    """The line that `--plan` prints, at least and at most."""
    line = planning._line("sum, at least and at most", "3 new", Cost(looking=1200, images=1000, seconds=60), Cost(looking=2_400_000, images=1000, seconds=90))
    bench = Bench(tmp_path)
    monkeypatch.setattr(bench, "pytest", lambda *_, **__: (1.0, 0, f"something\n{line}\nmore"))
    assert gate.plan(bench) == {"images": [1000], "passes": [1200, 2_400_000], "minutes": [1.0, 1.5]}
    monkeypatch.setattr(bench, "pytest", lambda *_, **__: (1.0, 4, "no such task"))
    with pytest.raises(PreconditionError, match="exit code 4: no such task"):
        gate.plan(bench)


def test_two_workers_are_held_against_one(tmp_path, monkeypatch):
    """Ratios of whole commands on three stores, and a verdict that changed is said."""
    asked = []

    def run(name: str, store: str, *arguments: str, threads: int = 1) -> Ran:
        asked.append((store, arguments, threads))
        claims = [{"id": id, "verdict": "broken" if (name, id) == ("two", "b") else "holds"} for id in "ab"]
        return Ran({"alone": 10.0, "two": 6.0, "threads": 5.0}[name], {"run": {"images": 7}, "claims": claims}, {})

    bench = Bench(tmp_path)
    monkeypatch.setattr(bench, "gate", run)
    found = gate.workers(bench)
    assert (found["two workers / one on one thread"], found["two workers / one on two threads"]) == (0.6, 1.2)
    assert found["verdicts that two workers changed"] == 1
    assert [(arguments, threads) for _, arguments, threads in asked] == [((), 1), (("-n", "2"), 1), ((), 2)]
    assert len({store for store, _, _ in asked}) == 3
    said = "\n".join(command.lines("workers", found))
    assert "0.6   target <= 0.65: met" in said
    assert "1.2   target <= 1: MISSED" in said


def test_a_part_that_fails_does_not_end_the_bench(tmp_path, monkeypatch, capsys):
    """Its error stands in its place, in the table and in the JSON file, the others are measured, and the exit code is 1."""

    def fails(bench: Bench) -> dict[str, Any]:
        raise PreconditionError("no luck")

    monkeypatch.setattr(command, "PARTS", {"cold": fails, "collect": lambda bench: {"seconds": 0.5, "rows": [{"a": 1, "b": None}, {"a": 2000, "b": [1, 2]}]}})
    assert main(["bench", "--json", str(tmp_path / "b.json"), "--folder", str(tmp_path / "runs")]) == 1
    parts = json.loads((tmp_path / "b.json").read_text())["parts"]
    assert (parts["cold"], parts["collect"]["seconds"]) == ({"error": "no luck"}, 0.5)
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-3:]] == [["a", "b"], ["1", "-"], ["2,000", "1", "to", "2"]]


@pytest.mark.parametrize(("share", "word"), [(0.8, "met"), (0.7, "MISSED")])
def test_a_share_must_be_large(share, word):
    """Of the targets, this one is met from below."""
    assert command.lines("cold", {"share inside model, detector, optimizer": share})[-1].endswith(f"{share}   target >= 0.75: {word}")


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    """An unknown part is guessed, and a folder that is not empty would not be a cold run's."""
    assert main(["bench", "--only", "cold,wram"]) == 2
    assert "Did you mean 'warm'?" in capsys.readouterr().err
    (tmp_path / "something").touch()
    with pytest.raises(SpecError, match="needs an empty folder"):
        Bench(tmp_path)


@pytest.mark.slow
def test_a_quick_bench_of_the_real_command_line(tmp_path, capsys):
    """From an empty store: shares of the time, passes no more than planned at most; then nothing is made again."""
    json_file = tmp_path / "b.json"
    assert main(["bench", "--quick", "--only", "cold,warm,bytes,collect,sampling", "--json", str(json_file), "--folder", str(tmp_path / "runs")]) == 0
    parts = json.loads(json_file.read_text())["parts"]
    cold = parts["cold"]
    assert 0 < cold["  detector"] < cold["  model"] < cold["share inside model, detector, optimizer"] < 1
    assert 0 < cold["UNet passes made"] <= cold["UNet passes planned"][-1]
    assert 0 < cold["images drawn"] <= cold["images at a fixed number a rate, planned"]
    assert (parts["warm"]["UNet passes made"], parts["warm"]["images drawn"]) == (0, 0)
    assert parts["bytes"]["checkpoints"] == 3
    assert 0 < parts["bytes"]["mean share, weights"] < 0.1
    assert parts["collect"]["claims"] > 100
    assert [(row["steps"], row["images"]) for row in parts["sampling"]["rows"]] == [(1, 75), (2, 75), (6, 75)]
    assert parts["sampling"]["rows"][0]["base accuracy"] < parts["sampling"]["base accuracy at the task's steps"]
    assert "== bytes" in capsys.readouterr().out
