"""SHS (Scissorhands): start the target's weights afresh, then repair the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn import init

from harness.data import Captioned
from harness.errors import SpecError
from harness.pipeline import Pipe, group
from harness.spec import ImageSet
from harness.training import Run, train
from harness.unlearning._forget import Order, above, accumulate, check_share, image_sets, load, relabelled

PRESETS: Mapping[str, str] = {  # what to write after --method
    "nudity": "shs:trims=selfattn:sparsity=0.995:steps=100:batch=16",
    "object": "shs:trims=selfattn:sparsity=0.999:steps=80:lr=2e-5:batch=8:forget=ascend:reinit=normal",
    "unlearncanvas": "shs:trims=x:sparsity=0.99:trim_batches=1:steps=30:batch=4:reinit=normal:order=first",
}


@dataclass(frozen=True)
class Method:
    """Scissorhands (Wu and Harandi, "Scrub Data Influence via Connection Sensitivity in Networks", arXiv 2401.06187).

    Trim: s = |w| sum_b |grad L_DM(theta; D_f batch b)|; weights with s above its `sparsity` quantile are initialised afresh.
    Repair: L = L_DM(theta; D_r) + lam F, with F = MSE(eps(c_f), sg[eps(c_a)]) (`relabel`) or -L_DM(theta; D_f) (`ascend`, unbounded below).
    `project` replaces the gradient g of L by the nearest one with <g, m> >= 0: m = grad L_DM(D_r), no step that harms what is
    retained; or m = grad F, no step that undoes the forgetting (the authors' choice in classification).
    Minimum cost: 1F + 1B per batch of the trim, then 3F + 2B a step (`ascend`: 2F + 2B), projected or not.

    Reference: JingWu321/Scissorhands@73ae065. Differs from it: its Stable Diffusion scripts define the projection and never call it; m is the current
    step's gradient (classification: refreshed every epoch), with margin 0 (0.5); its trim reaches two self-attention blocks, here the group `trims`; the
    object script scores weights by a guided loss; weights of norms start at 1; all losses are means; images of all batches are used.
    With steps or lr 0 nothing could be repaired, so nothing is trimmed.
    """

    sparsity: float = 0.995  # share of the weights that the trim leaves alone
    trims: str = "unet"  # the group within `trains` where weights are initialised afresh
    trim_batches: int = 10
    reinit: Literal["kaiming", "normal"] = "kaiming"  # uniform with bound sqrt(6 / fan_in), or normal with std .02 cut at 2
    lam: float = 0.1  # weight of the forget term
    forget: Literal["relabel", "ascend"] = "relabel"
    project: Literal["no", "retain", "forget"] = "no"
    steps: int = 500
    lr: float = 1e-5
    batch: int = 8  # of each set
    order: Order = "all"
    images_per_prompt: int = 5
    trains: str = "unet"
    seed: int = 0

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("erased", "anchor", "retain", "sampler")

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """Images of the erased concepts and of the retained ones."""
        return image_sets(task, self.images_per_prompt, self.seed)

    def passes(self, task: Any, steps: int) -> int:
        """Both terms, and the target where it relabels; once the batches of the trim."""
        once = self.trim_batches * self.batch if steps and self.lr else 0
        return steps * self.batch * (2 if self.forget == "ascend" else 3) + once

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Trim, if the run starts here, and repair; in place."""
        if run.start == 0 and self.steps and self.lr:
            self.trim(pipe, task, run)
        parameters = pipe.parameters(self.trains).values()
        if self.project == "no":
            train(parameters, *self.objective(pipe, task, run), run, steps=self.steps, lr=self.lr)
        else:
            memory = ("retain", "forget").index(self.project)
            weigh = lambda values, gram: projected(gram, memory)  # noqa: E731  # its types are those of train
            train(parameters, self._terms(pipe, task, run), lambda rng: rng, run, steps=self.steps, lr=self.lr, weigh=weigh)

    @torch.no_grad()
    def trim(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Initialise afresh the weights that the target depends on most."""
        chosen, belongs = pipe.parameters(self.trains), group(self.trims)
        if not any(map(belongs, chosen)):
            raise SpecError(f"trims '{self.trims}' has no weight in trains '{self.trains}'; let trims name a group within trains")
        forget, _ = self._data(pipe, task, run)

        def batches() -> Iterator[tuple[Tensor, Tensor, Generator]]:
            for i in range(self.trim_batches):
                rng = run.rng("trim", i)
                x_0, pair = forget.batch(self.batch, rng)
                yield x_0, pair[:, 0], rng

        sums = accumulate(pipe, run, self.trains, batches(), pipe.diffusion_loss, torch.abs)
        mask = above({name: chosen[name].abs() * total for name, total in sums.items()}, self.sparsity)
        for name, parameter in chosen.items():
            if belongs(name):
                parameter[mask[name]] = self._fresh(name, parameter, run.rng("fresh", name))[mask[name]]

    def _fresh(self, name: str, like: Tensor, rng: Generator) -> Tensor:
        """New values for a whole tensor; drawn on the CPU."""
        new = torch.empty(like.shape)
        if new.dim() < 2:
            init.constant_(new, float(name.endswith("weight")))  # norms and biases as torch starts them
        elif self.reinit == "kaiming":
            init.kaiming_uniform_(new, generator=rng)
        else:
            init.trunc_normal_(new, std=0.02, a=-0.04, b=0.04, generator=rng)
        return new.to(like)

    def objective(self, pipe: Pipe, task: Any, run: Run) -> tuple[Callable[[Any], Tensor], Callable[[Generator], Any]]:
        """The repair loss of a batch, and how a batch is drawn: it is drawn within the loss, from the step's generator."""
        terms = self._terms(pipe, task, run)

        def loss(rng: Generator) -> Tensor:
            kept, forgotten = terms(rng)
            return kept + forgotten

        return loss, lambda rng: rng

    def _terms(self, pipe: Pipe, task: Any, run: Run) -> Callable[[Generator], tuple[Tensor, Tensor]]:
        """L_DM(D_r) and lam F. The retain term draws first, as plain training on the retain set would."""
        forget, retain = self._data(pipe, task, run)

        def terms(rng: Generator) -> tuple[Tensor, Tensor]:
            kept = pipe.diffusion_loss(*retain.batch(self.batch, rng), rng)
            x_0, pair = forget.batch(self.batch, rng)
            if self.forget == "ascend":
                return kept, -self.lam * pipe.diffusion_loss(x_0, pair[:, 0], rng)
            return kept, self.lam * relabelled(pipe, x_0, pair, rng)()

        return terms

    def _data(self, pipe: Pipe, task: Any, run: Run) -> tuple[Captioned, Captioned]:
        return load(pipe, task, run, self.images(task), self.batch if self.order == "first" else None)


def projected(gram: Tensor, memory: int) -> Tensor:
    """Weights of the terms whose gradients g_i have inner products `gram`, such that sum_i w_i g_i is the vector nearest to
    sum_i g_i with a non-negative inner product with g_memory: all 1, and 1 + v for the memory (one constraint of GEM's program).
    """
    v = (-gram.sum(0)[memory] / gram[memory, memory].clamp_min(torch.finfo(gram.dtype).tiny)).clamp_min(0)
    weights = torch.ones_like(gram[0])
    weights[memory] += v
    return weights
