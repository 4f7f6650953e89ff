"""SFRon: ascend on the target where that costs the rest least, and repair after every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from harness.data import Captioned
from harness.errors import SpecError
from harness.pipeline import Pipe
from harness.spec import ImageSet
from harness.training import Run, train
from harness.unlearning._forget import accumulate, guided_loss, hold, image_sets, load, one_pass, relabelled

PRESETS: Mapping[str, str] = {  # what to write after --method
    "nudity": "sfron:forget=rl:decay=0:gamma=0:batch=2",
}


@dataclass(frozen=True)
class Method:
    """SFRon (Huang et al., 2024, "Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement").

    Every step is two: on alpha_f(k) L_f, for the weights of the mask, then on alpha_r L_DM(theta; D_r), for all. L_f is
    `ga`, -mean_i l_i, l_i the diffusion loss of image i of D_f; `adaga`, -mean_i w_i l_i with w_i = n l_i^-lam / sum_j l_j^-lam, which
    ascends less on what is forgotten; or `rl`, relabelling as in SalUn. alpha_f(k) = alpha_f (1 + cos(pi k / decay)) / 2, then 0.
    Mask (forget-remain balanced): m = [ (F_f + 1e-15) / (F_r + 1e-15) >= gamma ], F the mean over batches of the squared gradient of the guided loss.
    Minimum cost: 2F + 2B and two optimizer steps (`rl`: 3F + 2B); the mask 2F + 2B once per image of both sets (none with gamma 0).

    Reference: K1nght/Unified-Unlearning-w-Remain-Geometry@36bb7f6. Differs from it: each of the two steps has its own optimizer state (one Adam
    would move masked weights by the repair's momentum); its Stable Diffusion script never applies the mask; gradients
    are not clipped before they are squared; `decay` is a field, so that a run can go on; no averaging of weights (nil there). Its CIFAR losses are sums
    over 3072 values: clip 1 there is 3.3e-4 here; the mask and w_i do not depend on the scale.
    CIFAR: alpha_f=10, lam=0.5, lr=1e-4, batch=128, 150 steps, mask_guidance=2.
    On a v-prediction model l_i is an error of v, so `adaga` balances other losses than the paper's.
    """

    forget: Literal["adaga", "ga", "rl"] = "adaga"
    lam: float = 0.5  # adaga's lambda; 0 is ga
    alpha_f: float = 1.0
    alpha_r: float = 1.0
    decay: int = 1000  # steps in which alpha_f falls to 0; 0: it stays
    gamma: float = 1.0  # of the mask; 0: no mask
    mask_guidance: float = 7.5  # w in (1 + w) eps(c) - w eps(""); the usual CFG scale minus 1
    clip: float | None = None
    steps: int = 1000
    lr: float = 1e-5
    batch: int = 4  # of each set
    images_per_prompt: int = 5
    trains: str = "unet"
    seed: int = 0

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("erased", "anchor", "retain", "sampler")
    families: ClassVar[tuple[str, ...]] = ("text-to-image", "class-conditional")

    def __post_init__(self) -> None:
        for name in ("gamma", "decay", "lam"):
            if not getattr(self, name) >= 0:
                raise SpecError(f"{name} must be at least 0, got {getattr(self, name)}; 0 switches it off")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """Images of the erased concepts and of the retained ones."""
        return image_sets(task, self.images_per_prompt, self.seed)

    def passes(self, task: Any, steps: int) -> int:
        """Both losses, and the target where it relabels; once both halves of the guidance of every image, for the mask."""
        once = sum(2 * len(chosen.prompts) for chosen in self.images(task).values()) if self.gamma else 0
        return steps * self.batch * (3 if self.forget == "rl" else 2) + once

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit the group `trains` in place: masked forgetting, unmasked repair."""
        mask = self.mask(pipe, task, run) if self.gamma else None
        parameters = pipe.parameters(self.trains)
        forget, retain = self._losses(pipe, task, run)
        adjust = hold(parameters, mask) if mask else None
        train(parameters.values(), forget, lambda rng: rng, run, steps=self.steps, lr=self.lr, clip=self.clip, adjust=adjust, repair=retain)

    def mask(self, pipe: Pipe, task: Any, run: Run) -> dict[str, Tensor]:
        """Which weights the forgetting may move (True); taken at the weights before unlearning."""
        forget, retain = load(pipe, task, run, self.images(task))
        forget.embeddings = forget.embeddings[:, 0]
        fisher_f, fisher_r = (self._fisher(pipe, run, data) for data in (forget, retain))
        return {name: (fisher_f[name] + 1e-15) / (fisher_r[name] + 1e-15) >= self.gamma for name in fisher_f}

    def _fisher(self, pipe: Pipe, run: Run, data: Captioned) -> dict[str, Tensor]:
        """Mean over batches of the squared gradient. Batch i of either set meets the same noise: only what it shows differs."""
        loss = partial(guided_loss, pipe, self.mask_guidance)
        sums = accumulate(pipe, run, self.trains, one_pass(data, self.batch, run), loss, torch.square)
        return {name: total / math.ceil(len(data.mean) / self.batch) for name, total in sums.items()}

    def objective(self, pipe: Pipe, task: Any, run: Run) -> tuple[Callable[[Any], Tensor], Callable[[Generator], Any]]:
        """The sum of both steps' losses, and how a batch is drawn: within the loss, from the step's generator."""
        forget, retain = self._losses(pipe, task, run)
        return lambda rng: forget(rng) + retain(rng), lambda rng: rng

    def _losses(self, pipe: Pipe, task: Any, run: Run) -> tuple[Callable[[Generator], Tensor], Callable[[Generator], Tensor]]:
        """alpha_f(k) L_f and alpha_r L_DM(D_r)."""
        forget, retain = load(pipe, task, run, self.images(task))

        def loss_f(rng: Generator) -> Tensor:
            x_0, pair = forget.batch(self.batch, rng)
            alpha = self.alpha_f * fading(run.start + len(run.losses), self.decay)
            if self.forget == "rl":
                return alpha * relabelled(pipe, x_0, pair, rng)()
            losses = pipe.diffusion_losses(x_0, pair[:, 0], rng)
            return -alpha * (losses if self.forget == "ga" else balance(losses.detach(), self.lam) * losses).mean()

        return loss_f, lambda rng: self.alpha_r * pipe.diffusion_loss(*retain.batch(self.batch, rng), rng)


def balance(losses: Tensor, lam: float) -> Tensor:
    """w_i = n l_i^-lam / sum_j l_j^-lam: the mean is 1, and larger losses (already forgotten) count less."""
    return len(losses) * torch.softmax(-lam * losses.log(), 0)


def fading(step: int, decay: int) -> float:
    """(1 + cos(pi k / decay)) / 2 from 1 to 0; always 1 without a decay."""
    return (1 + math.cos(math.pi * min(step / decay, 1))) / 2 if decay else 1.0
