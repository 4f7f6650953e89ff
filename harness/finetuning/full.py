"""Full fine-tuning: every weight of the UNet on benign images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.finetuning._benign import image_set, objective
from harness.pipeline import Pipe
from harness.spec import ImageSet
from harness.training import Run, train


@dataclass(frozen=True)
class Finetune:
    """Ordinary fine-tuning with L_DM on images that the base model draws of other concepts.

    Source: "concept resurgence" (arXiv 2410.08074), appendix C: 10 concepts x 5 prompts x 5 images. Differs from it:
    learning rate, batch and optimizer are not stated there. 1F + 1B a step.
    """

    data: str = "in"  # a name in the task's [finetune]
    steps: int = 200
    lr: float = 1e-5
    batch: int = 4
    images_per_prompt: int = 5
    trains: str = "unet"
    seed: int = 0

    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("text-to-image", "class-conditional")
    reads: ClassVar[tuple[str, ...]] = ("finetune", "sampler")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """The fine-tuning images."""
        return {"train": image_set(task, self.data, self.images_per_prompt, self.seed)}

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit the group `trains` in place."""
        loss, batch_at = objective(pipe, self.images(task)["train"].prompts, run, self.batch)
        train(pipe.parameters(self.trains).values(), loss, batch_at, run, steps=self.steps, lr=self.lr, optimizer="adamw", clip=1.0)
