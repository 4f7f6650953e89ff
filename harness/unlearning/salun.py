"""SalUn: relabel the target, by the weights that matter for it alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Generator, Tensor

from harness.pipeline import Pipe
from harness.spec import ImageSet
from harness.training import Run, train
from harness.unlearning._forget import Order, above, accumulate, check_share, guided_loss, hold, image_sets, load, one_pass, relabelled

PRESETS: Mapping[str, str] = {  # what to write after --method
    "canonical": "salun",
    "unlearncanvas": "salun:trains=x:sparsity=0:alpha=1:order=first:batch=4:steps=30",
}


@dataclass(frozen=True)
class Method:
    """SalUn (Fan et al., 2024, "SalUn: Empowering Machine Unlearning via Gradient-Based Weight Saliency").

    L = MSE(eps(x_t, t, c_f), sg[eps(x_t, t, c_a)]) + alpha L_DM(theta; D_r), x_t from images of the target and c_a the anchor's name in
    the caption; the target is the current model's, without gradient. Only weights with mask 1 move:
    m = [ |sum_b grad L(D_f batch b)| > its `sparsity` quantile ], L the loss of the guided prediction, one pass over D_f.
    Minimum cost: 3F + 2B a step; 2F + 2B for the mask, once per image of D_f (none with sparsity 0).

    Reference: OPTML-Group/Unlearn-Saliency@a6e89fd. Differs from it: one latent for student and target (theirs samples two); no dropout; images of
    all batches are used; the quantile is taken over the group `trains`; `clip` follows the mask (CIFAR code: precedes it). Its CIFAR losses are
    sums over 3072 values in the retain term only: alpha 1e-3 there is 3.07 here, beside lr=1e-4, batch=128, clip=1, mask_guidance=2.
    Nudity: alpha=0.1, steps=100.
    PRESETS["unlearncanvas"] is OPTML-Group/UnlearnCanvas@920cfd1, where the mask never reaches a gradient and one batch is all that is seen.
    """

    alpha: float = 0.5  # weight of the retain term
    sparsity: float = 0.5  # share of the weights that the mask leaves alone; 0: no mask
    mask_guidance: float = 7.5  # w in (1 + w) eps(c) - w eps(""); the usual CFG scale minus 1
    steps: int = 600
    lr: float = 1e-5
    batch: int = 8  # of each set
    clip: float | None = None
    order: Order = "all"
    images_per_prompt: int = 5
    trains: str = "unet"
    seed: int = 0

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("erased", "anchor", "retain", "sampler")
    families: ClassVar[tuple[str, ...]] = ("text-to-image", "class-conditional")

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """Images of the erased concepts and of the retained ones."""
        return image_sets(task, self.images_per_prompt, self.seed)

    def passes(self, task: Any, steps: int) -> int:
        """Target, student and retain term; once both halves of the guidance of every image to forget, for the mask."""
        return steps * 3 * self.batch + (2 * len(self.images(task)["forget"].prompts) if self.sparsity else 0)

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit the masked part of the group `trains` in place."""
        mask = self.mask(pipe, task, run) if self.sparsity else None
        parameters = pipe.parameters(self.trains)
        adjust = hold(parameters, mask) if mask else None
        train(parameters.values(), *self.objective(pipe, task, run), run, steps=self.steps, lr=self.lr, clip=self.clip, adjust=adjust)

    def mask(self, pipe: Pipe, task: Any, run: Run) -> dict[str, Tensor]:
        """Which weights may move (True); taken at the weights before unlearning."""
        forget, _ = load(pipe, task, run, self.images(task))
        forget.embeddings = forget.embeddings[:, 0]
        loss = partial(guided_loss, pipe, self.mask_guidance)
        scores = accumulate(pipe, run, self.trains, one_pass(forget, self.batch, run), loss, lambda gradient: gradient)
        return above({name: score.abs() for name, score in scores.items()}, self.sparsity)

    def objective(self, pipe: Pipe, task: Any, run: Run) -> tuple[Callable[[Any], Tensor], Callable[[Generator], Any]]:
        """The loss of a batch, and how a batch is drawn: it is drawn within the loss, from the step's generator."""
        forget, retain = load(pipe, task, run, self.images(task), self.batch if self.order == "first" else None)

        def loss(rng: Generator) -> Tensor:  # the retain term draws first, as plain training on the retain set would
            kept = pipe.diffusion_loss(*retain.batch(self.batch, rng), rng)
            return relabelled(pipe, *forget.batch(self.batch, rng), rng)() + self.alpha * kept

        return loss, lambda rng: rng
