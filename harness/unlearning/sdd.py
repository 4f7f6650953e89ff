"""SDD: a student learns from itself to answer the concept as if nothing had been asked; its average is the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from harness.errors import SpecError
from harness.pipeline import Pipe, denoise
from harness.spec import ImageSet, Sampler
from harness.training import Run, train
from harness.unlearning._concepts import distinct, positive

Which = Literal["iterative", "joint"]


@dataclass(frozen=True)
class Method:
    """SDD (Kim et al., 2023, "Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models").

    L = || sg[eps_theta(x_t, "", t)] - eps_theta(x_t, c_s, t) ||^2, both from the student; x_t comes from partially
    denoising noise with guidance by the teacher, an exponential moving average of the student. **The teacher is the
    result**: a checkpoint holds it, its state the student. Nothing pins the prediction for "", which can drift.
    Minimum cost of a step: 1F without gradient + 1F+1B, besides the sampling of x_t.

    Reference: nannullna/safe-diffusion@a2e820c. Its code samples x_t under all concepts, joined by commas, and
    trains on one; its README does the reverse (`sample_under="iterative", train_under="joint"`). Differs from it: an
    iterative concept is drawn and not taken in turn; t is the exact timestep of x_t (the code draws it from a
    bucket); where it denoises no step, x_t is noise (the code then takes a finished picture for noise); float32.
    On a v-prediction model the error is one of v: timestep t weighs 1 / alpha_bar_t as much.
    """

    trains: str = "x"  # x, x-strict, u, f, selfattn
    steps: int = 1500
    lr: float = 1e-5
    batch: int = 1
    decay: float = 0.999  # m: teacher <- m teacher + (1 - m) student, after every step
    corrected: bool = False  # the average without the m^k that it still owes to the start: for few steps
    sample_under: Which = "joint"  # x_t is drawn under all names joined, or under one
    train_under: Which = "iterative"  # c_s is one name, or all joined
    guidance: float = 3.0  # CFG of the sampling of x_t
    sampler_steps: int = 50
    weight_decay: float = 1e-4  # AdamW's: towards 0, not towards the start
    clip: float = 1.0  # bound of the gradient's norm; 0: none
    seed: int = 0

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("erased",)

    def __post_init__(self) -> None:
        positive(self, "batch")
        if not 0 <= self.decay <= 1 - 1e-9 * self.corrected:  # a corrected average of nothing is 0 / 0
            raise SpecError(f"`decay` must lie in [0, 1], below 1 if `corrected`, got {self.decay}")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """None: SDD needs the concept's name only."""
        return {}

    def passes(self, task: Any, steps: int) -> int:
        """On average: target, student, and half of the sampler's steps, each with both halves of the guidance."""
        return round(steps * self.batch * (2 + (1 if self.guidance == 1 else 2) * (self.sampler_steps - 1) / 2))

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Leave the teacher in the group `trains`, and the student in the run's state."""
        student = pipe.parameters(self.trains)
        teacher = {name: p.detach().clone() for name, p in student.items()}  # when going on, the weights are the teacher's
        loss, batch_at = self.objective(pipe, task, run, teacher)
        done = count(run.start + 1)

        def average() -> None:
            weight = self.weight(next(done))
            for name, p in student.items():
                teacher[name].lerp_(p.detach(), weight)

        how = {"steps": self.steps, "lr": self.lr, "optimizer": "adamw", "weight_decay": self.weight_decay, "clip": self.clip or None}
        train(student.values(), loss, batch_at, run, **how, after=average, carried=student)  # type: ignore[arg-type]  # each its own type
        for name, p in student.items():
            p.data.copy_(teacher[name])

    def weight(self, step: int) -> float:
        """The student's share in the teacher at a step counted from 1. Corrected, it is the whole at first."""
        share = 1 - self.decay
        return share / (1 - self.decay**step) if self.corrected else share

    def objective(
        self, pipe: Pipe, task: Any, run: Run, teacher: Mapping[str, Tensor] | None = None
    ) -> tuple[Callable[[Any], Tensor], Callable[[Generator], Any]]:
        """The loss of a batch, and how a batch is drawn: by `teacher`, or without one by the model before unlearning."""
        distinct(pipe, task.erased.concepts)
        sampler, teacher = Sampler(self.sampler_steps, self.guidance), run.original if teacher is None else teacher
        asked, learnt = (self._texts(pipe, task.erased.concepts, field) for field in ("sample_under", "train_under"))

        def batch_at(rng: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            chosen = torch.randint(len(task.erased.concepts), (self.batch,), generator=rng).tolist()
            c_p, c_s = (pipe.encode([texts[i] for i in chosen]) for texts in (asked, learnt))
            null = pipe.encode([""] * self.batch)
            x_T = torch.randn((self.batch, *pipe.latent_shape), generator=rng).to(pipe.device)
            stop = int(torch.randint(self.sampler_steps, (), generator=rng))
            with pipe.swapped(teacher):
                x_t, t = denoise(pipe, x_T, c_p, null, sampler, stop)
            return x_t, t, c_s, null

        def loss(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
            x_t, t, c_s, null = batch
            with torch.no_grad():
                eps_null = pipe.predict(x_t, t, null)
            return mse_loss(pipe.predict(x_t, t, c_s), eps_null)

        return loss, batch_at

    def _texts(self, pipe: Pipe, concepts: tuple[str, ...], field: str) -> list[str]:
        """The prompt for each concept: its name, or all names joined."""
        if getattr(self, field) == "iterative":
            return list(concepts)
        joined = ", ".join(concepts)
        try:
            pipe.encode([joined])
        except SpecError as error:
            raise SpecError(f"`{field}` is 'joint': {error}, or set `{field}` to 'iterative'") from error
        return [joined] * len(concepts)
