"""Gradient ascent: unlearn by training backwards on what is to be forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Generator, Tensor

from harness.data import Captioned
from harness.pipeline import Pipe
from harness.spec import ImageSet
from harness.training import Run, train
from harness.unlearning._concepts import distinct, positive


@dataclass(frozen=True)
class Method:
    """Gradient ascent with a retain term (eq. 5 of "DiMRA and DiMUM", arXiv 2512.03564).

    L = L_DM(theta; D_r) - lambda L_DM(theta; D_f), with D_f the forgotten concepts' images under their own prompts.
    The second term has no minimum: the loss falls without bound, so `steps` and `lr` decide how far it goes.
    2F + 2B a step. Nothing is assumed of an embedding but that it comes from `encode`.

    Reference: OPTML-Group/Unlearn-Saliency@a6e89fd, `--method ga` of its DDPM code, which sums each image's squared errors
    (`reduction="sum"`). Differs from it: the mean by default; lambda weighs the forget term, as in eq. 5, not the
    retain term; no clipping of the gradient unless asked; all images are drawn by the base model itself.
    """

    lam: float = 1.0  # lambda
    reduction: Literal["mean", "sum"] = "mean"  # over one image's squared errors; over the batch it is the mean
    steps: int = 100
    lr: float = 1e-5
    batch: int = 4  # of each set
    clip: float = 0.0  # bound of the gradient's norm; 0: none
    images_per_prompt: int = 5
    trains: str = "unet"
    seed: int = 0

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("erased", "retain", "sampler")
    families: ClassVar[tuple[str, ...]] = ("text-to-image", "class-conditional")

    def __post_init__(self) -> None:
        positive(self, "batch", "images_per_prompt")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """The retain set and the forget set."""
        return {
            "retain": ImageSet.of(task.retain, self.images_per_prompt, self.seed),
            "forget": ImageSet.of(task.erased, self.images_per_prompt, self.seed),
        }

    def passes(self, task: Any, steps: int) -> int:
        """A batch of each set."""
        return steps * 2 * self.batch

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit the group `trains` in place."""
        moving = pipe.parameters(self.trains).values()
        train(moving, *self.objective(pipe, task, run), run, steps=self.steps, lr=self.lr, clip=self.clip or None)

    def objective(self, pipe: Pipe, task: Any, run: Run) -> tuple[Callable[[Any], Tensor], Callable[[Generator], Any]]:
        """The loss of a batch, and how a batch is drawn: it is drawn within the loss, from the step's generator."""
        distinct(pipe, task.erased.concepts)
        retain, forget = (Captioned(pipe, run.images[name], chosen.prompts) for name, chosen in self.images(task).items())

        def term(data: Captioned, rng: Generator) -> Tensor:
            x_0, embeddings = data.batch(self.batch, rng)
            mean = pipe.diffusion_loss(x_0, embeddings, rng)
            return mean * x_0[0].numel() if self.reduction == "sum" else mean

        def loss(rng: Generator) -> Tensor:  # the retain term draws first, as plain training on the retain set would
            return term(retain, rng) - self.lam * term(forget, rng)

        return loss, lambda rng: rng
