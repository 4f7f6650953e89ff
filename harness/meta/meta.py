"""Meta-unlearning: unlearn so that fine-tuning on what was unlearned does not bring it back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from harness import catalogue
from harness.data import Captioned
from harness.devices import DTYPE
from harness.errors import SpecError
from harness.meta import _gradient
from harness.pipeline import Pipe
from harness.spec import ImageSet
from harness.training import Run, train

DECIDED = ("steps", "lr", "seed")  # fields of the base method that this stage's own take the place of


@dataclass(frozen=True)
class Method:
    """Meta-unlearning (algorithm 1 and eq. 3 of "Meta-Unlearning on Diffusion Models", arXiv 2410.12777) around a method that has a loss.

    Each step adds gamma_2 times the gradient of -L_DM(theta'; D_FT) - zeta [L_DM(theta'; D_r) - L_DM(theta; D_r)] to gamma_1
    times the base method's own, where theta' is theta after M = `inner_steps` fine-tuning steps of size tau on D_FT. The
    base method runs as it is, with its optimizer, mask and averages; `base=None` is the paper's second stage after a closed form
    (UCE, RECE): the meta term alone. `order`: `first` takes the gradient at theta' for the one at theta; `exact`
    differentiates through the inner steps, twice backward; `hvp` does so by differences of gradients. With
    gamma_2 = 0 the weights are the base method's, bit for bit. All draws of the meta term come from a generator of its own.

    Cost of a step besides the base's, in F + B: first M + 3, exact M + 3 and M double backwards, hvp 3 M + 3. Peak memory in
    multiples of the trained weights P (measured in tests/meta), with P of weights, P of gradients and 2 P of Adam outside: first 5
    (public code: 10), 8 with Adam inside; exact and hvp M + 7. Activations are not counted, exact keeps about twice as
    many, nor is the base method's frozen copy (ESD), of which precomputed targets would rid it.

    Reference: sail-sg/Meta-Unlearning@5a2a760, which is first order, steps inside with AdamW and averages nothing over its
    batches. Differs from it: SGD inside unless asked, as in the paper; zeta weighs both retain terms alike; the inner steps move the
    group that is trained and not the whole UNet; D_FT and D_r are drawn by the base model from the task's erased
    and retain prompts; each term sees a batch of its own, the same for both retain terms; no clipping of its own.
    """

    base: Any = None  # an unlearning stage with a loss
    steps: int = 1000
    lr: float = 1e-5
    trains: str = "unet"  # second stage only; else the base's
    gamma_1: float = 1.0
    gamma_2: float = 0.05
    zeta: float = 1.0
    tau: float = 1e-5
    inner_steps: int = 1  # M
    inner: Literal["sgd", "momentum", "adam", "adamw"] = "sgd"
    order: Literal["first", "exact", "hvp"] = "first"
    batch: int = 4
    images_per_prompt: int = 5
    seed: int = 0

    version: ClassVar[int] = 1

    @classmethod
    def around(cls, base: Any, **fields: Any) -> Method:
        """The stage with the base's own steps, rate and seed unless `fields` give others."""
        return cls(base, **{**{name: getattr(base, name) for name in DECIDED}, **fields})

    def __post_init__(self) -> None:
        if self.inner != "sgd" and self.order != "first":
            raise SpecError(f"order '{self.order}' differentiates through SGD steps, inner is '{self.inner}'; take inner=sgd or order=first")
        if self.inner_steps < 1 or self.batch < 1 or self.tau < 0:
            raise SpecError(f"need inner_steps >= 1, batch >= 1 and tau >= 0, got {self.inner_steps}, {self.batch} and {self.tau}")
        if self.base is not None:
            if not hasattr(self.base, "objective"):
                raise SpecError(f"{type(self.base).__module__} has no loss to add to; put meta-unlearning after it as a second stage")
            here = {f.name for f in dataclasses.fields(self.base)} & set(DECIDED)
            object.__setattr__(self, "base", replace(self.base, **{name: type(getattr(self.base, name))(0) for name in here}))
            object.__setattr__(self, "trains", self.base.trains)

    @property
    def reads(self) -> tuple[str, ...]:
        """The base's parts of the task, the two of the meta term, and how their images are drawn."""
        return tuple(dict.fromkeys((*getattr(self.base, "reads", ()), "erased", "retain", "sampler")))

    def _stage(self) -> Any:
        """The base method as it will run."""
        here = {f.name for f in dataclasses.fields(self.base)}
        return replace(self.base, **{name: getattr(self, name) for name in DECIDED if name in here})

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """The base's own, D_FT and D_r."""
        own = self._stage().images(task) if self.base is not None else {}
        meta = {"forget": task.erased, "retain": task.retain}
        return {**own, **{f"meta.{name}": ImageSet.of(group, self.images_per_prompt, self.seed) for name, group in meta.items()}}

    def passes(self, task: Any, steps: int) -> int:
        """The base's own; then the inner steps (walked back through unless `first`), the loss after them, and the retain term at both ends."""
        own = catalogue.passes(self._stage(), task, steps) if self.base is not None else 0
        walks = {"first": 1, "exact": 2, "hvp": 3}[self.order]
        extra = walks * self.inner_steps + 1 + 2 * (self.zeta != 0)
        return own + (steps * self.batch * extra if self.gamma_2 else 0)

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit the group `trains` in place."""
        if self.order == "hvp" and pipe.dtype != torch.float32:
            raise SpecError(f"order 'hvp' takes differences of gradients, which {pipe.dtype} rounds away; set {DTYPE}=float32, or take order=exact")
        if self.gamma_2 or self.gamma_1 != 1:
            run.extra = self._extra(pipe, task, run)
        try:
            if self.base is not None:
                self._stage()(pipe, task, run)
            else:
                moving = list(pipe.parameters(self.trains).values())
                train(moving, lambda batch: _nothing(moving), lambda rng: None, run, steps=self.steps, lr=self.lr, clip=1.0)
        finally:
            run.extra = None

    def _extra(self, pipe: Pipe, task: Any, run: Run) -> Any:
        """What happens to the gradient after the base's backward pass, once a step."""
        sets = self.images(task)
        data = {name: Captioned(pipe, run.images[f"meta.{name}"], sets[f"meta.{name}"].prompts) for name in ("forget", "retain")}
        step = count(run.start)

        def loss(name: str, rng: Generator) -> _gradient.Loss:
            x_0, embeddings = data[name].batch(self.batch, rng)
            seed = int(torch.randint(2**62, (), generator=rng))
            return lambda: pipe.diffusion_loss(x_0, embeddings, torch.Generator().manual_seed(seed))

        def extra(parameters: list[Tensor]) -> None:
            rng = run.rng("meta", next(step))
            inner = [loss("forget", rng) for _ in range(self.inner_steps)]
            terms = inner, loss("forget", rng), loss("retain", rng)
            if self.gamma_1 != 1:
                for p in parameters:
                    if p.grad is not None:
                        p.grad.mul_(self.gamma_1)
            if self.gamma_2:
                _gradient.add(parameters, *terms, gamma=self.gamma_2, zeta=self.zeta, tau=self.tau, optimizer=self.inner, order=self.order)

        return extra


def _nothing(parameters: list[Tensor]) -> Tensor:
    """A loss of zero whose gradient is zero."""
    return 0 * torch.stack([p.flatten()[0] for p in parameters]).sum()
