"""CA: ask for the target, get what was learnt for the anchor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from harness.data import Captioned
from harness.errors import SpecError
from harness.pipeline import Pipe
from harness.spec import Group, ImageSet
from harness.training import Run, train
from harness.unlearning._concepts import distinct, positive


@dataclass(frozen=True)
class Method:
    """CA (Kumari et al., 2023, "Ablating Concepts in Text-to-Image Diffusion Models").

    On a noised image x_t of the anchor, drawn under the prompt c, with c* the same prompt about the target:
    `model`: L = || sg[eps_theta(x_t, c, t)] - eps_theta(x_t, c*, t) ||^2;  `noise`: L = || eps - eps_theta(x_t, c*, t) ||^2.
    `prior` adds prior * || eps - eps_theta(x_t, c, t) ||^2. Minimum cost of a step: `model` 1F without gradient + 1F+1B,
    `noise` 1F+1B, with the prior 2F+2B for both, since its prediction, detached, is what `model` aims at.

    Reference: nupurkmr9/concept-ablation@c11fb1b. Differs from it: the anchor and the prompts are the task's, all
    images are drawn by the base model itself, at its own size and whole; the errors are averaged over the latent's
    channels too, where it sums them for the ablation only, so that its prior of 1 is 0.25 here; the prior shares x_t.
    `lr` is what its 2e-6 becomes after it is multiplied by 2 GPUs and a batch of 4.
    On a v-prediction model all errors are of v, the `noise` variant's and the prior's against the true v.
    """

    variant: Literal["model", "noise"] = "model"
    prior: float = 0.0  # the reference uses it (as 0.25) where target and anchor share words
    detach_start: bool = True  # no gradient through the start token's keys and values, which all prompts share
    trains: str = "unet.xattn_kv"
    steps: int = 100
    lr: float = 1.6e-5
    batch: int = 8
    images_per_prompt: int = 5
    weight_decay: float = 1e-2  # AdamW's: towards 0, not towards the start
    clip: float = 1.0  # bound of the gradient's norm; 0: none
    seed: int = 0

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("erased", "anchor", "sampler")

    def __post_init__(self) -> None:
        positive(self, "batch", "images_per_prompt")
        if self.prior < 0:
            raise SpecError(f"`prior` must be at least 0, got {self.prior}")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """The anchor's images under the target's prompts: as many for each of its names."""
        return {"anchor": ImageSet.of(Group(task.anchor.concepts, task.erased.prompts), self.images_per_prompt * len(task.erased.concepts), self.seed)}

    def passes(self, task: Any, steps: int) -> int:
        """One UNet pass an image that learns, and one that is its target or the prior."""
        return steps * self.batch * (1 + (self.variant == "model" or self.prior > 0))

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit the group `trains` in place."""
        how = {"steps": self.steps, "lr": self.lr, "optimizer": "adamw", "weight_decay": self.weight_decay, "clip": self.clip or None}
        train(pipe.parameters(self.trains).values(), *self.objective(pipe, task, run), run, **how)  # type: ignore[arg-type]  # each its own type

    def objective(self, pipe: Pipe, task: Any, run: Run) -> tuple[Callable[[Any], Tensor], Callable[[Generator], Any]]:
        """The loss of a batch, and how a batch is drawn."""
        distinct(pipe, task.erased.concepts, task.anchor.concepts)
        data = Captioned(pipe, run.images["anchor"], self.images(task)["anchor"].prompts)
        data.embeddings = torch.stack([data.embeddings, pipe.encode(self._renamed(task))], dim=1)

        def batch_at(rng: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            x_0, texts = data.batch(self.batch, rng)
            noise = torch.randn(x_0.shape, generator=rng).to(x_0)
            t = torch.randint(pipe.schedule.config.num_train_timesteps, (self.batch,), generator=rng).to(pipe.device)
            velocity = pipe.schedule.config.prediction_type == "v_prediction"
            truth = pipe.schedule.get_velocity(x_0, noise, t) if velocity else noise
            return pipe.noised(x_0, noise, t), t, texts[:, 0], texts[:, 1], truth

        def loss(batch: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> Tensor:
            x_t, t, c, c_star, truth = batch
            with start_detached(pipe) if self.detach_start else nullcontext():
                ablated = pipe.predict(x_t, t, c_star)
                if self.variant == "noise" and not self.prior:
                    return mse_loss(ablated, truth)
                with nullcontext() if self.prior else torch.no_grad():
                    anchored = pipe.predict(x_t, t, c)
            total = mse_loss(ablated, truth if self.variant == "noise" else anchored.detach())
            return total + self.prior * mse_loss(anchored, truth) if self.prior else total

        return loss, batch_at

    def _renamed(self, task: Any) -> list[str]:
        """For each image of the anchor its prompt about a target, all targets in turn."""
        each = [text.replace("{}", name) for text in task.erased.prompts for name in task.erased.concepts for _ in range(self.images_per_prompt)]
        return each * len(task.anchor.concepts)


@contextmanager
def start_detached(pipe: Pipe) -> Iterator[None]:
    """Keys and values of the start token, position 0, keep their numbers but pass on no gradient."""

    def cut(module: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return torch.cat([out[:, :1].detach(), out[:, 1:]], dim=1)

    layers = [module for name, module in pipe.unet.named_modules() if name.endswith((".attn2.to_k", ".attn2.to_v"))]
    handles = [module.register_forward_hook(cut) for module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
