"""An unlearning method's own loss along a trajectory, on a fixed probe: does it converge? (DiMRA's argument, arXiv 2512.03564, section IV.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from harness import pipeline
from harness.engine import Engine
from harness.errors import SpecError
from harness.spec import Lineage
from harness.training import Run


def snapshots(lineage: Lineage, grid: Sequence[int]) -> list[Lineage]:
    """The lineage at each step of a grid within its last stage's trajectory."""
    if not grid or list(grid) != sorted(set(grid)) or grid[0] < 1:
        raise SpecError(f"a grid of snapshots is rising whole numbers from 1, got {list(grid)}")
    if grid[-1] > lineage.steps:
        raise SpecError(f"the trajectory ends after {lineage.steps} steps, so there is no snapshot at {grid[-1]}; lengthen it or drop that snapshot")
    return [lineage.parent.then(replace(lineage.stages[-1], steps=k)) for k in grid]  # type: ignore[type-var]  # stages are dataclasses


def unlearning_loss(engine: Engine, unlearned: Lineage, models: Sequence[Lineage], draws: int = 16) -> list[float]:
    """The loss of `unlearned`'s last stage at the weights of each model: snapshots of unlearning, or of an attack after it.

    The probe is the same for all of them: `draws` batches that no step of training sees, and the original weights of
    the method's own frozen copy; a method that samples its x_t from the student (ESD by default) draws them anew.
    A loss that falls without bound, or a residual that stays, has not converged.
    """
    stage = unlearned.stages[-1]
    if not hasattr(stage, "objective"):
        raise SpecError(f"{type(stage).__module__} has no loss to record")
    root, sampler = Lineage(unlearned.base, unlearned.task), unlearned.task.sampler
    task = unlearned.task.view(stage.reads)
    images = {name: engine.read_images(engine.images(root, (chosen, sampler))) for name, chosen in stage.images(task).items()}

    def look(model: Lineage) -> Tensor:
        mine = pipeline.group(stage.trains)
        original = {name: p.detach().clone() for name, p in engine.load(unlearned.parent).named().items() if mine(name)}
        pipe, run = engine.load(model), Run(stage.seed, images, original)
        loss, batch_at = stage.objective(pipe, task, run)
        with torch.no_grad():
            return torch.stack([loss(batch_at(run.rng("probe", i))) for i in range(draws)]).mean().cpu()

    what = {"stage": unlearned.key, "draws": draws}
    return [engine.kept("curves", {**what, "model": model.key}, lambda model=model: look(model)).item() for model in models]  # type: ignore[misc]
