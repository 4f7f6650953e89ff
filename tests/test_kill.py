"""Killed at any moment, the next run goes on, and what it ends with is what an undisturbed run makes, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import sampling
from harness.engine import Engine
from harness.finetuning import lora
from harness.inventory import artefacts, damage
from harness.spec import ImageSet, Lineage
from harness.store import Store
from harness.unlearning import esd
from tests import tiny
from tests.conftest import die
from tests.test_chains import METHODS, PATIENCE, TUNE, command, prepared

TASK = tiny.task()
WANTED = (ImageSet(("a x", "the y"), (5, 6)), TASK.sampler)
PHASES = {"publishing": Store.publish, "sampling": sampling.draw.__wrapped__, "unlearning": esd.Method.__call__, "fine-tuning": lora.Finetune.__call__}  # type: ignore[attr-defined]
EACH = 13  # kills in each phase: 52


class Means:
    """A detector: the mean of each colour."""

    address = "mean colour"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Scores (n, 3)."""
        return images.mean((2, 3))


def work(engine: Engine, root: Lineage) -> None:
    """Unlearn, fine-tune to two snapshots, draw, look."""
    erased = root.then(esd.Method(steps=2, lr=1e-2, batch=1, sampler_steps=2))
    two, four = (erased.then(lora.Finetune(steps=steps, lr=1e-2, batch=1, images_per_prompt=1)) for steps in (2, 4))
    if failures := engine.build([two, four], [(four, WANTED)]):
        raise next(iter(failures.values()))
    engine.scores(four, WANTED, Means())


def counted(run: Callable[[], object], at: int = -1) -> bytes:
    """Run, and be killed before the `at`-th call of a Python function; else the phase of each call, as a place in `PHASES`."""
    codes = {function.__code__: i for i, function in enumerate(PHASES.values())}
    phases, within = bytearray(), [len(codes)]

    def look(frame: Any, event: str, _: Any) -> None:
        place = codes.get(frame.f_code)
        if event == "call":
            if place is not None:
                within.append(place)
            if len(phases) == at:
                die()
            phases.append(within[-1])
        elif event == "return" and place is not None:
            within.pop()

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return bytes(phases)


def forked(run: Callable[[], object], patience: float = PATIENCE) -> int:
    """The exit code of a copy of this process that does it, killed after so many seconds; minus the signal's number if a signal ended it."""
    late = time.monotonic() + patience
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > late:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def contents(store: Path) -> dict[str, bytes]:
    """Every tensor file of the store, by its place."""
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in store.glob("*/[!.]*/*.safetensors")}


def inodes(store: Path) -> dict[str, int]:
    """Each finished artefact's folder."""
    return {each.place: each.folder.stat().st_ino for each in artefacts(Store(store))}


def nursery(folder: Path, root: Lineage, phase: str) -> tuple[list[str], int]:
    """Undisturbed once; then killed at random calls within the phase, and again without a kill. What went wrong, and how often it was killed."""
    engine = Engine(Store(folder / "warm"))
    engine.load(root)  # each copy of this process has the model in memory already

    def undisturbed(place: Path) -> None:
        engine.store = Store(place)
        work(engine, root)

    def disturbed(place: Path, call: int) -> None:
        (folder / "phases").write_bytes(counted(lambda: undisturbed(place), call))

    assert forked(lambda: disturbed(folder / "whole", -1)) == 0
    expected, phases = contents(folder / "whole"), (folder / "phases").read_bytes()
    rng, wrong, kills = random.Random(phase), [], 0
    calls = [call for call, place in enumerate(phases) if place == list(PHASES).index(phase)]
    for call in sorted(rng.choice(calls) for _ in range(EACH)):
        store = folder / f"{call}-{kills}"
        kills += forked(partial(disturbed, store, call)) == -9
        before = inodes(store) if store.exists() else {}
        damaged = [damage(Store(store), each) for each in artefacts(Store(store))]
        code = forked(partial(undisturbed, store))
        if code or any(damaged) or contents(store) != expected or not before.items() <= inodes(store).items():
            wrong.append(f"call {call}: exit {code}, damaged {damaged}, files {sorted(contents(store).keys() ^ expected.keys())}")
    return wrong, kills


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_at_a_random_moment_changes_nothing(phase, base, tmp_path, child):
    """SIGKILL in unlearning, fine-tuning, sampling or publishing: what is left is whole, is not made again, and the end is the same to the bit."""
    assert child(nursery, tmp_path, Lineage(base, TASK), phase).result() == ([], EACH)


def verdicts(folder: Path) -> tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    """What an undisturbed gate says; and what two say that were killed at random moments first, each with how often."""
    place = prepared(folder, "sd14")
    asked = ["suites/object", "--no-control", "--steps", "2", "--finetune", TUNE, "--method", f"{METHODS['esd']},{METHODS['uce']}"]

    def gate(name: str, patience: float = PATIENCE) -> bool:
        """Whether the run came to its end, which is a verdict and no crash; else it was killed."""
        options = {"--model": place / "model", "--task": place / "object.toml", "--store": folder / name, "--report": folder / f"report-{name}"}
        code = forked(lambda: os._exit(command([*asked, *(str(each) for pair in options.items() for each in pair)])[0]), patience)
        assert code in {-9, 11, 12}, code
        return code != -9

    def said(name: str) -> dict[str, Any]:
        """All that the verdict says of the claims, but for how long it took."""
        found = json.loads((folder / f"report-{name}" / "verdict.json").read_text())
        return {"exit": found["exit_code"], "claims": [{**claim, "seconds": 0} for claim in found["claims"]], "lineages": sorted(found["lineages"])}

    started = time.monotonic()
    assert gate("whole")
    whole, rng, disturbed = time.monotonic() - started, random.Random(5), []
    for name in ("first", "second"):
        kills = sum(not gate(name, whole * rng.uniform(0.2, 0.8)) for _ in range(3))
        assert gate(name)
        disturbed.append((kills, said(name)))
    return said("whole"), disturbed


@pytest.mark.slow
def test_a_gate_that_was_killed_says_in_the_end_what_an_undisturbed_one_says(tmp_path, child):
    """The command itself, killed by the clock wherever it is, over and over on one store: rates, hits, words and exit code are the same."""
    expected, disturbed = child(verdicts, tmp_path).result(6 * PATIENCE)
    assert {claim["verdict"] for claim in expected["claims"]} >= {"holds"}
    for kills, found in disturbed:
        assert kills
        assert found == expected
