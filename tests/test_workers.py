"""How workers share a run: heavy work starts on all of them at once, none waits for images that another draws, and what is cheap comes last."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import PROCESSES
from tests.test_plugin import ROOT, lay

LOGGED = """

import os, time
from pathlib import Path
from fixtures import claims

_measured = claims.measured

def logged(lab, cell, claim):
    started = time.time()
    time.sleep(0.0 if cell.claim == "instruments" else 0.3)
    with open("log.txt", "a") as log:
        log.write(f"{os.environ.get('PYTEST_XDIST_WORKER', 'alone')} {cell.claim} {started} {time.time()}\\n")
    return _measured(lab, cell, claim)

claims.measured = logged
"""


@pytest.fixture(autouse=True)
def _no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs started here are not those of the worker that this test may be in."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def run(pytester: pytest.Pytester, *args: str, extra: str = LOGGED) -> tuple[dict, dict[str, list[tuple[str, float, float]]]]:
    """The verdict of scripted claims, and what each worker measured, in its order: claim, start, end."""
    lay(pytester.path, extra=extra)
    pytester.runpytest_subprocess("suites/celebrity", "-p", "no:cacheprovider", "--report", "out", "--method", "uce", "--steps", "50", *args, timeout=120)
    found: dict[str, list[tuple[str, float, float]]] = {}
    for line in (pytester.path / "log.txt").read_text().splitlines():
        worker, claim, started, ended = line.split()
        found.setdefault(worker, []).append((claim, float(started), float(ended)))
    return json.loads((pytester.path / "out" / "verdict.json").read_text()), {
        worker: sorted(items, key=lambda each: each[1]) for worker, items in found.items()
    }


def test_workers_start_on_heavy_tests_and_end_on_cheap_ones(pytester):
    """Under -n 2 both begin with models at the same time, and each ends with an instrument, whose images are there by then; every claim has its verdict."""
    verdict, workers = run(pytester, "-n", "2")
    (_, first, end), (_, other, its_end) = (items[0] for items in workers.values())
    assert [items[0][0] == "instruments" for items in workers.values()] == [False, False]
    assert max(first, other) < min(end, its_end)
    assert [items[-1][0] for items in workers.values()] == ["instruments"] * 2
    assert sum(map(len, workers.values())) == len(verdict["claims"]) == 17
    assert verdict["missing"] == []


def test_one_worker_begins_with_the_instruments(pytester):
    """Whoever watches is told first where the instruments are unsound."""
    _, workers = run(pytester, "-k", "Tildeth")
    assert [claim for claim, _, _ in workers["alone"]] == ["instruments", "forgotten", "stays-forgotten"]


# --- images, shared out before anything is measured -------------------------------------------------------------------


def prepared(folder: Path, written: tuple[str, ...], start: Any) -> dict[str, int]:
    """One worker's part, begun when the others are ready."""
    from fixtures import planning
    from fixtures.lab import Lab
    from tests import test_plan

    options = test_plan.parsed(*written)
    cells = [cell for claim in test_plan.CLAIMS for cell in options.cells(claim, test_plan.TASK)]
    engine = test_plan.Engine(test_plan.Store(folder))
    lab = Lab(options, test_plan.TASK, engine)
    pictures = planning.certain(options, test_plan.TASK, engine.store, cells)
    start.wait(60)
    lab.prepare(cells, lambda: pictures)
    return engine.cost()


WRITTEN = ("--method", "uce,dimum:steps=2:batch=1:images_per_prompt=1", "--finetune", "lora-in:batch=1:images_per_prompt=1", "--steps", "2,4")


def test_workers_share_out_the_images_too(tiny_folder, tmp_path, child, monkeypatch):
    """Two workers draw what a run draws for certain, each a part and none twice; whoever measures then draws nothing up to the floor."""
    from tests import test_plan

    monkeypatch.setattr("fixtures.lab.CAP_MISTAKEN", 12)  # as the task's own cap
    written = ("--model", str(tiny_folder), *WRITTEN, "--profile", "smoke")
    start = PROCESSES.Barrier(2)
    costs = [each.result() for each in [child(prepared, tmp_path, written, start) for _ in range(2)]]
    store = test_plan.Store(tmp_path)
    there = sum(len(store.record(store.folder("images", address))["prompts"]) for address in store.addresses("images"))
    assert sum(cost["images"] for cost in costs) == there > 0
    assert all(cost["images"] > 0 for cost in costs)
    options = test_plan.parsed(*written)
    selection = options, [cell for claim in test_plan.CLAIMS for cell in options.cells(claim, test_plan.TASK)]
    assert test_plan.done(selection, store, None).cost()["images"] == 0  # the task's floor is its cap


def test_what_a_method_refuses_is_said_and_the_rest_is_planned(tiny_folder, tmp_path, monkeypatch):
    """A method that cannot serve the task costs its own claims, not the plan."""
    from fixtures import planning
    from harness.errors import SpecError
    from harness.unlearning import dimum
    from tests import test_plan

    def refuses(self: Any, task: Any) -> Any:
        raise SpecError("not this task")

    monkeypatch.setattr(dimum.Method, "images", refuses)
    options = test_plan.parsed("--model", str(tiny_folder), *WRITTEN, "--profile", "smoke")
    noting = planning.Noting(test_plan.Store(tmp_path))
    planning._rehearse(options, test_plan.TASK, noting, [cell for claim in test_plan.CLAIMS for cell in options.cells(claim, test_plan.TASK)])
    assert noting.refused
    assert all("dimum" in claim and reason == "not this task" for claim, reason in noting.refused.items())
    said = "\n".join(planning.lines(noting, 9))
    assert f"not planned: {len(noting.refused)} claims that will be invalid" in said
    assert "uce of" in said


@pytest.mark.parametrize(("worker", "wrong", "expected"), [(True, False, ["images"]), (False, False, []), (True, True, [])], ids=["worker", "alone", "wrong"])
def test_only_workers_share_images_out(tmp_path, monkeypatch, worker, wrong, expected):
    """One process draws what it needs when it needs it; what is wrong with the request is left to the claims to say."""
    from fixtures import plugin
    from fixtures.keys import ENGINE, OPTIONS
    from harness.errors import SpecError
    from tests.test_options import parsed

    given: list[Any] = []

    def certain(*_: Any) -> list[str]:
        if wrong:
            raise SpecError("no such label")
        return ["images"]

    monkeypatch.setattr("fixtures.planning.certain", certain)
    lab = SimpleNamespace(ready=lambda: None, prepare=lambda cells, pictures: given.extend(pictures() if pictures else ()))
    monkeypatch.setattr("fixtures.lab.Lab", lambda *_: lab)
    config = SimpleNamespace(stash={OPTIONS: parsed(), ENGINE: SimpleNamespace(store=None), plugin.LABS: {}}, **({"workerinput": {}} if worker else {}))
    request: Any = SimpleNamespace(config=config, path=ROOT / "suites" / "celebrity" / "test_celebrity.py", session=SimpleNamespace(items=[]))
    plugin.lab._get_wrapped_function()(request)
    assert given == expected


def test_a_store_that_has_every_model_is_asked_for_no_images(tiny_folder, tmp_path):
    """Knowing which images a run needs takes seconds, which a run that only reads need not spend."""
    from fixtures.lab import Lab
    from tests import test_plan
    from tests.test_options import parsed

    options, asked = parsed("--model", str(tiny_folder), "--method", "uce", "--profile", "smoke"), list[str]()
    engine = test_plan.Engine(test_plan.Store(tmp_path))
    for expected in (["asked"], []):
        asked.clear()
        Lab(options, test_plan.TASK, engine).prepare(options.cells("forgotten", test_plan.TASK), lambda: asked.append("asked") or [])
        assert asked == expected
