"""Parts of the bench that run single stages of the pocket model in this process, without tests around them."""

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


COLUMNS = ("method", "steps", "seconds", "passes", "passes planned", "seconds planned", "images before")


def made(worker: Engine, lineage: Lineage) -> tuple[float, int]:
    """Seconds and UNet passes of making one checkpoint."""
    before, started = worker.cost()["unet_passes"], time.perf_counter()
    worker.checkpoint(lineage)
    return time.perf_counter() - started, worker.cost()["unet_passes"] - before


def presets(kind: str, name: str) -> Any:
    """A stage as the pocket model's presets have it."""
    return catalogue.make(kind, Spec(name), pocket.presets("pocket"))
