"""ESD: predict, for the target, the opposite of what names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from harness.pipeline import Pipe, denoise
from harness.spec import ImageSet, Sampler
from harness.training import Run, train


@dataclass(frozen=True)
class Method:
    """ESD (Gandikota et al., 2023, "Erasing Concepts from Diffusion Models").

    L = || eps_theta(x_t, c, t) - [eps_0(x_t, "", t) - eta (eps_0(x_t, c, t) - eps_0(x_t, "", t))] ||^2, where eps_0
    is the model before unlearning and x_t comes from partially denoising noise under c with guidance. Minimum cost of
    a step: 2F frozen + 1F+1B trained, besides the sampling of x_t.

    Reference: rohitgandikota/erasing@a2189e9 (paper's code) and @25613d2 (newer). The newer code's
    `negative_guidance` equals eta + 1. Differs from them: t is the exact timestep of x_t (the paper's code draws it
    from a bucket 39-58 steps noisier); DDIM, so every timestep can be drawn; float32 weights; the model's own size. A
    class-conditional model has no cross-attention (`trains` is u, f or selfattn): c is the class, "" its null label. On a
    v-prediction model the target is the same (its weights add up to 1) and the error is one of v: timestep t weighs 1 / alpha_bar_t as much.
    """

    trains: str = "x"  # x, x-strict, u, f, selfattn
    eta: float = 1.0  # the paper's eta
    steps: int = 1000
    lr: float = 1e-5
    batch: int = 1
    guidance: float = 3.0  # CFG of the sampling of x_t
    sampler_steps: int = 50
    x_t_from: Literal["student", "frozen"] = "student"  # paper: student; newer public code: frozen
    prompts: Literal["name", "task"] = "name"  # c is the bare name, or the name in the task's prompts
    seed: int = 0

    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("text-to-image", "class-conditional")
    reads: ClassVar[tuple[str, ...]] = ("erased",)

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """None: ESD needs the concept's name only."""
        return {}

    def passes(self, task: Any, steps: int) -> int:
        """On average: two frozen, one trained, and half of the sampler's steps, each with both halves of the guidance."""
        return round(steps * self.batch * (3 + (1 if self.guidance == 1 else 2) * (self.sampler_steps - 1) / 2))

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit the group `trains` in place."""
        train(pipe.parameters(self.trains).values(), *self.objective(pipe, task, run), run, steps=self.steps, lr=self.lr)

    def objective(self, pipe: Pipe, task: Any, run: Run) -> tuple[Callable[[Any], Tensor], Callable[[Generator], Any]]:
        """The loss of a batch, and how a batch is drawn."""
        texts = [t for c in task.erased.concepts for t in ((c,) if self.prompts == "name" else task.erased.asking(c))]

        def batch_at(rng: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            chosen = torch.randint(len(texts), (self.batch,), generator=rng).tolist()
            cond, null = pipe.encode([texts[i] for i in chosen]), pipe.encode([""] * self.batch)
            x_T = torch.randn((self.batch, *pipe.latent_shape), generator=rng).to(pipe.device)
            stop = int(torch.randint(self.sampler_steps, (), generator=rng))
            with pipe.swapped(run.original) if self.x_t_from == "frozen" else nullcontext():
                x_t, t = denoise(pipe, x_T, cond, null, Sampler(self.sampler_steps, self.guidance), stop)
            with pipe.swapped(run.original):
                eps_null, eps_c = pipe.predict(torch.cat([x_t, x_t]), t, torch.cat([null, cond])).chunk(2)
            return x_t, t, cond, target(eps_null, eps_c, self.eta)

        def loss(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
            x_t, t, cond, wanted = batch
            return mse_loss(pipe.predict(x_t, t, cond), wanted)

        return loss, batch_at


def target(eps_null: Tensor, eps_c: Tensor, eta: float) -> Tensor:
    """eps_null - eta (eps_c - eps_null): for eta 0, the unconditional prediction."""
    return eps_null - eta * (eps_c - eps_null)
