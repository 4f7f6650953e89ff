"""EraseDiff: forget as the constraint of keeping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from harness.pipeline import Pipe
from harness.spec import ImageSet
from harness.training import Run, train
from harness.unlearning._forget import Order, image_sets, load, relabelled

PRESETS: Mapping[str, str] = {  # what to write after --method
    "nudity": "erasediff:barrier=constant:lam=1:trains=u:steps=160:batch=16",
    "imagenette": "erasediff:barrier=constant:lam=1:steps=60:batch=16",
    "unlearncanvas": "erasediff:barrier=constant:lam=0.1:trains=x:lr=5e-5:steps=75:batch=4:order=first",
}


@dataclass(frozen=True)
class Method:
    """EraseDiff (Wu et al., "Erasing Undesirable Influence in Diffusion Models", arXiv 2401.05779).

    min L_DM(theta; D_r) subject to q(theta) = f(theta) - f(theta^K) <= 0, where f = MSE(eps(x_t, t, c_f), sg[eps(x_t, t, c_a)]) and
    theta^K is an inner copy, K optimizer steps on f from theta. A step follows grad L_r + lambda grad q, with theta^K held fixed
    (the first-order method BOME) and lambda = max(0, (a - <grad L_r, grad q>) / ||grad q||^2). `barrier` says what a is:
    `value`, a = eta q; `gradient`, a = eta ||grad q||^2; `constant`, lambda = lam (the published runs). Only `value` lets the inner
    level move a weight: elsewhere f(theta^K) is an additive constant, and the inner copy is not made. It asks for nothing where q <= 0, and
    q scales with lr and with the model, so eta has no natural scale there; under `gradient` lambda is about eta.
    Minimum cost: 3F + 2B a step; `value` adds (K + 1)F + K B, a copy of the group `trains` and an optimizer's state of its own.

    Reference: JingWu321/EraseDiff@14f4e98. Differs from it: there inner and outer steps share one Adam, which alone carries what the
    inner loop does, and outer steps within the K loop are thrown away; its dynamic lambda uses the cosine, eta - cos, and does not run
    for Stable Diffusion. The inner steps take the outer step's batch and target, so that q compares like with like; all losses are means
    (CIFAR: lambda .1 there, beside a sum over 3072 values, is 3.3e-5 here); images of all batches are used.
    """

    barrier: Literal["value", "gradient", "constant"] = "value"
    eta: float = 1.0  # of the barriers
    lam: float = 1.0  # lambda, where constant
    inner_steps: int = 2  # K
    steps: int = 160
    lr: float = 1e-5  # of both levels
    batch: int = 8  # of each set
    order: Order = "all"
    images_per_prompt: int = 5
    trains: str = "unet"
    seed: int = 0

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("erased", "anchor", "retain", "sampler")
    families: ClassVar[tuple[str, ...]] = ("text-to-image", "class-conditional")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """Images of the erased concepts and of the retained ones."""
        return image_sets(task, self.images_per_prompt, self.seed)

    def passes(self, task: Any, steps: int) -> int:
        """Target, student and retain term; under `value` also the inner steps and the loss they end at."""
        return steps * self.batch * (3 + (self.inner_steps + 1 if self.barrier == "value" else 0))

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit the group `trains` in place."""
        parameters = pipe.parameters(self.trains).values()
        if self.barrier == "constant":
            train(parameters, *self.objective(pipe, task, run), run, steps=self.steps, lr=self.lr)
        else:
            train(parameters, self._terms(pipe, task, run), lambda rng: rng, run, steps=self.steps, lr=self.lr, weigh=self.weigh)

    def weigh(self, values: Tensor, gram: Tensor) -> Tensor:
        """(1, lambda) from q = values[1] and the inner products of grad L_r and grad q."""
        (_, overlap), (_, norm) = gram.unbind(0)
        a = self.eta * (values[1] if self.barrier == "value" else norm)
        lam = ((a - overlap) / norm.clamp_min(torch.finfo(gram.dtype).tiny)).clamp_min(0)
        return torch.stack([torch.ones_like(lam), torch.where(norm > 0, lam, 0)])

    def objective(self, pipe: Pipe, task: Any, run: Run) -> tuple[Callable[[Any], Tensor], Callable[[Generator], Any]]:
        """L_r + lam f, the form with a constant lambda, and how a batch is drawn: within the loss, from the step's generator."""
        terms = self._terms(pipe, task, run)

        def loss(rng: Generator) -> Tensor:
            kept, forgotten = terms(rng)
            return kept + self.lam * forgotten

        return loss, lambda rng: rng

    def _terms(self, pipe: Pipe, task: Any, run: Run) -> Callable[[Generator], tuple[Tensor, Tensor]]:
        """L_r and q; without its constant where that could not matter."""
        forget, retain = load(pipe, task, run, self.images(task), self.batch if self.order == "first" else None)

        def terms(rng: Generator) -> tuple[Tensor, Tensor]:
            x_0, c_r = retain.batch(self.batch, rng)
            f = relabelled(pipe, *forget.batch(self.batch, rng), rng)
            least = self._least(pipe, f) if self.barrier == "value" else 0.0  # before a graph needs the weights it moves
            return pipe.diffusion_loss(x_0, c_r, rng), f() - least

        return terms

    def _least(self, pipe: Pipe, f: Callable[[], Tensor]) -> float:
        """f(theta^K). The weights themselves stay."""
        copy = {name: parameter.detach().clone() for name, parameter in pipe.named().items() if parameter.requires_grad}
        with pipe.swapped(copy):
            parameters = [pipe.named()[name] for name in copy]
            with torch.enable_grad():
                train(parameters, lambda _: f(), lambda rng: None, Run(self.seed), steps=self.inner_steps, lr=self.lr)
            return f().item()
