"""What every benign fine-tune does with its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Generator, Tensor

from harness.data import Captioned
from harness.errors import unknown
from harness.pipeline import Pipe
from harness.spec import Group, ImageSet
from harness.training import Run

Batch = tuple[Tensor, Tensor, Generator]


def chosen_group(task: Any, data: str) -> Group:
    """The task's fine-tuning set of that name."""
    if data not in task.finetune:
        raise unknown("fine-tuning set", data, task.finetune)
    group: Group = task.finetune[data]
    return group


def image_set(task: Any, data: str, per_prompt: int, seed: int) -> ImageSet:
    """Images of the set's concepts, drawn by the base model."""
    return ImageSet.of(chosen_group(task, data), per_prompt, seed)


def objective(pipe: Pipe, captions: tuple[str, ...], run: Run, size: int) -> tuple[Callable[[Batch], Tensor], Callable[[Generator], Batch]]:
    """The diffusion loss on the images the stage asked for under the name `train`, and its batches."""
    data = Captioned(pipe, run.images["train"], captions)
    return lambda batch: pipe.diffusion_loss(*batch), lambda rng: (*data.batch(size, rng), rng)
