"""What the committed recipes share: fixed-n counts of many models, drawn by several processes on one store."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.engine import Wanted
from harness.spec import Group, Lineage, Task

HERE = Path(__file__).parent


def lab_of(task: str, store: Path) -> Any:
    """The lab of one of this suite's tasks, or of another's by its path, on the pocket model that it is made for."""
    from fixtures.lab import Lab
    from fixtures.options import Options
    from harness.engine import Engine
    from harness.store import Store

    options = Options("pocket", None, (), ("lora-in",), (50, 200), task, "standard", None, None, 1, store, store, True)
    return Lab(options, Task.load(HERE / f"{task}.toml"), Engine(Store(store), lambda line: print(f"  {line}", flush=True)))


def fill(task: str, store: Path, lineages: Iterable[Lineage], pictures: Iterable[tuple[Lineage, Wanted]], workers: int) -> None:
    """Make everything that is missing, `workers` processes of one thread each."""
    share(_work, [(task, store, list(lineages), list(pictures))] * workers, workers)


def share(work: Callable[..., None], jobs: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Do each job once, `workers` processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as crew:
            for done in [crew.submit(work, *job) for job in jobs]:
                done.result()
    except BrokenProcessPool as error:
        raise SystemExit("a worker was killed; run the same command again, finished work is kept") from error


def _work(task: str, store: Path, lineages: list[Lineage], pictures: list[tuple[Lineage, Wanted]]) -> None:
    for error in lab_of(task, store).engine.build(lineages, pictures).values():
        print(f"  not made: {error}", flush=True)


def asked(lab: Any, group: Group, rounds: int) -> list[tuple[Group, Wanted]]:
    """One picture set per concept of the group: `rounds` images of each of its prompts."""
    from harness import measurement

    each = [replace(group, concepts=(c,)) for c in group.concepts]
    return [(one, (measurement.round_images(one, range(rounds), 0), lab.task.sampler)) for one in each]


def counts(lab: Any, lineage: Lineage, group: Group, rounds: int) -> dict[str, tuple[int, int]]:
    """Hits and images of each concept of the group, at fixed n = rounds x prompts."""
    from harness import measurement

    seen = {}
    for one, wanted in asked(lab, group, rounds):
        hits = measurement.hits(lab.engine, lineage, wanted, lab.detector, [one.concepts[0]] * len(one.prompts))
        seen[one.concepts[0]] = (int(hits.sum()), hits.numel())
    return seen


def keep(file: Path, result: dict[str, Any]) -> None:
    """Write what a search found; trials and choices of earlier runs that this one did not repeat stay."""
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        result = result | {part: before[part] | result[part] for part in ("chosen", "trials")}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def provenance() -> dict[str, str]:
    """Versions of what computes the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "timm")}}
