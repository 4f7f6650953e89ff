"""Parts of the bench that run the pocket model in this process, without tests around it: single stages, and drawing alone."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import catalogue, jobs, plan, pocket
from harness.bench.gate import ROOT, SUITE, Bench
from harness.catalogue import Spec
from harness.errors import ResurgenceError
from harness.spec import Lineage, Task
from harness.store import Store

if TYPE_CHECKING:
    from harness.engine import Engine

GRID = (50, 100, 200, 300)
SAMPLING, KEPT = (3, 4, 5, 6, 8), 0.97  # sampling steps to try, and the share of images that must show whom they are of


def root() -> Lineage:
    """The pocket model and the celebrity task, whose presets are the pocket model's."""
    from harness import pipeline

    return Lineage(pipeline.identify("pocket"), Task.load(ROOT / SUITE / "pocket.toml"))


def engine(folder: Path) -> Engine:
    """One on a store of its own."""
    from harness.engine import Engine

    return Engine(Store(folder))


def snapshots(bench: Bench) -> dict[str, Any]:
    """UNet passes of one LoRA fine-tune with snapshots, and of one from the start for each snapshot."""
    return compared(root(), presets("finetuning", "lora"), (1, 2, 4, 6) if bench.quick else GRID, bench.folder)


def compared(base: Lineage, stage: Any, grid: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """Together in one store; apart, each in its own, with the same images to learn from."""
    ends = [base.then(dataclasses.replace(stage, steps=steps)) for steps in grid]
    together = engine(folder / "together")
    for _, wanted in jobs.needed(ends[0]):
        together.images(base, wanted)
    for steps in grid:
        shutil.copytree(together.store.root, folder / f"apart-{steps}")
    one = [made(together, end) for end in ends]
    alone = [engine(folder / f"apart-{steps}") for steps in grid]
    each = [made(worker, end) for worker, end in zip(alone, ends, strict=True)]
    files = [(worker.folder(ends[-1]) / "weights.safetensors").read_bytes() for worker in (together, alone[-1])]
    rows = [
        {"steps": steps, "passes together": a[1], "seconds together": a[0], "passes apart": b[1], "seconds apart": b[0]}
        for steps, a, b in zip(grid, one, each, strict=True)
    ]
    return {
        "UNet passes, together": sum(passes for _, passes in one),
        "UNet passes, apart": sum(passes for _, passes in each),
        "seconds, together": sum(seconds for seconds, _ in one),
        "seconds, apart": sum(seconds for seconds, _ in each),
        "the longest has the same weights": files[0] == files[1],
        "rows": rows,
    }


def methods(bench: Bench) -> dict[str, Any]:
    """Every unlearning method with the pocket model's presets."""
    return costs(root(), {name: presets("unlearning", name) for name in catalogue.names("unlearning")}, bench.folder / "methods", bench.steps)


def costs(base: Lineage, stages: dict[str, Any], folder: Path, steps: int | None = None) -> dict[str, Any]:
    """Seconds and UNet passes of each stage, once the images that it learns from are there, beside the plan's."""
    worker, rows = engine(folder), []
    for name, stage in stages.items():
        short = {field: steps for field in ("steps", "lora_steps") if steps and hasattr(stage, field)}
        lineage = base.then(dataclasses.replace(stage, **short))
        planned = plan.cost(jobs.Job(lineage))
        try:
            images = sum(len(worker.read_images(worker.images(base, wanted))) for _, wanted in jobs.needed(lineage))
            worker.load(base)
            seconds, passes = made(worker, lineage)
        except ResurgenceError as error:
            rows.append({**dict.fromkeys(COLUMNS, "-"), "method": name, "seconds": f"{type(error).__name__}: {error}"})
            continue
        values: tuple[Any, ...] = (name, getattr(lineage.stages[-1], "steps", "-"), seconds, passes, planned.passes, planned.seconds, images)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return {"methods": len(rows), "rows": rows}


def sampling(bench: Bench) -> dict[str, Any]:
    """How often the pocket model draws whom it is asked for, by sampling steps: every person of the task, two images a prompt."""
    from harness.detection.classifier import Detector

    base = root()
    grid, rounds = ((1, 2), 1) if bench.quick else (SAMPLING, 2)
    return accuracies(base, Detector(base.task.detector["folder"]), grid, rounds, bench.folder / "sampling")


def accuracies(base: Lineage, detector: Any, grid: tuple[int, ...], rounds: int, folder: Path) -> dict[str, Any]:
    """Share of images of the erased and the retained concepts in which the detector sees them, from the same noise at each number of steps."""
    from harness import measurement, stats

    worker, task, rows = engine(folder), base.task, []
    worker.load(base)
    for steps in sorted({*grid, task.sampler.steps}):
        started, hits = time.perf_counter(), list[bool]()
        for asked in (task.erased, task.retained):
            wanted = measurement.round_images(asked, range(rounds), 0), dataclasses.replace(task.sampler, steps=steps)
            labels = [concept for concept in asked.concepts for _ in asked.asking(concept)]
            hits += measurement.hits(worker, base, wanted, detector, labels).flatten().tolist()
        seconds, (share, low, high, _) = time.perf_counter() - started, stats.clopper_pearson(sum(hits), len(hits), 0.05)
        values = (steps, len(hits), share, low, high, seconds)
        rows.append(dict(zip(("steps", "images", "base accuracy", "low", "high", "seconds"), values, strict=True)))
    return {
        f"the fewest steps that keep {KEPT:g}": min((row["steps"] for row in rows if row["base accuracy"] >= KEPT), default=None),
        "the task's steps": task.sampler.steps,
        "base accuracy at the task's steps": next(row["base accuracy"] for row in rows if row["steps"] == task.sampler.steps),
        "rows": rows,
    }


COLUMNS = ("method", "steps", "seconds", "passes", "passes planned", "seconds planned", "images before")


def made(worker: Engine, lineage: Lineage) -> tuple[float, int]:
    """Seconds and UNet passes of making one checkpoint."""
    before, started = worker.cost()["unet_passes"], time.perf_counter()
    worker.checkpoint(lineage)
    return time.perf_counter() - started, worker.cost()["unet_passes"] - before


def presets(kind: str, name: str) -> Any:
    """A stage as the pocket model's presets have it."""
    return catalogue.make(kind, Spec(name), pocket.presets("pocket"))
