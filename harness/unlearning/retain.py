"""Retain: the control that only goes on training on what is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor

from harness.data import Captioned
from harness.pipeline import Pipe
from harness.spec import ImageSet
from harness.training import Run, train
from harness.unlearning._concepts import positive


@dataclass(frozen=True)
class Method:
    """Fine-tuning on the retain set and nothing else, a control: the retain loss of "DiMRA and DiMUM", arXiv 2512.03564, eq. 5.

    L = L_DM(theta; D_r). What this forgets, a method with a retain term forgets without its unlearning term: at equal
    seed, steps, batch and images it takes DiMUM's and gradient ascent's steps with lambda = 0, bit for bit. 1F + 1B a step.

    Differs from the paper: there it is a term of a loss, not a method; all images are drawn by the base model itself.
    """

    steps: int = 1000
    lr: float = 1e-5
    batch: int = 4
    images_per_prompt: int = 5
    trains: str = "unet"
    seed: int = 0

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("retain", "sampler")
    families: ClassVar[tuple[str, ...]] = ("text-to-image", "class-conditional")

    def __post_init__(self) -> None:
        positive(self, "batch", "images_per_prompt")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """The retain set."""
        return {"retain": ImageSet.of(task.retain, self.images_per_prompt, self.seed)}

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit the group `trains` in place."""
        train(pipe.parameters(self.trains).values(), *self.objective(pipe, task, run), run, steps=self.steps, lr=self.lr)

    def objective(self, pipe: Pipe, task: Any, run: Run) -> tuple[Callable[[Any], Tensor], Callable[[Generator], Any]]:
        """The loss of a batch, and how a batch is drawn: it is drawn within the loss, from the step's generator."""
        retain = Captioned(pipe, run.images["retain"], self.images(task)["retain"].prompts)
        return lambda rng: pipe.diffusion_loss(*retain.batch(self.batch, rng), rng), lambda rng: rng
