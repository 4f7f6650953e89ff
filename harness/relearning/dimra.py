"""DiMRA: relearn what was unlearned from data that does not contain it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from harness.finetuning._benign import objective
from harness.pipeline import Pipe
from harness.spec import ImageSet, seed_of
from harness.training import Run, train


@dataclass(frozen=True)
class Attack:
    """DiMRA (eq. 7 of "DiMRA and DiMUM", arXiv 2512.03564): minimise L_DM(theta; D_aux) over all weights; D_aux holds no forget sample.

    Assumption (i), `data="retain"`: the retain set itself, the very images that an unlearning method with the same
    seed and as many images per prompt learned from. Assumption (ii), `data="auxiliary"`: as many other images that the
    model before unlearning draws for the same prompts. That no caption names an erased concept is checked when the
    task is read. The result is the largest rate on a grid of snapshots fixed beforehand. 1F + 1B a step.

    No public code. Differs from the paper: its optimizer, rate, batch and grid are not stated, ours are fields; the
    retain set is drawn by the base model.
    """

    data: Literal["retain", "auxiliary"] = "retain"
    steps: int = 400
    lr: float = 1e-5
    batch: int = 4
    images_per_prompt: int = 5
    trains: str = "unet"
    seed: int = 0

    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("text-to-image", "class-conditional")
    reads: ClassVar[tuple[str, ...]] = ("retain", "sampler")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """D_aux."""
        seed = self.seed if self.data == "retain" else seed_of("auxiliary", self.seed)
        return {"train": ImageSet.of(task.retain, self.images_per_prompt, seed)}

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit the group `trains` in place."""
        loss, batch_at = objective(pipe, self.images(task)["train"].prompts, run, self.batch)
        train(pipe.parameters(self.trains).values(), loss, batch_at, run, steps=self.steps, lr=self.lr)
