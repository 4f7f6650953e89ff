"""RECE: find what still means the concept to an edited model, and edit that away too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import SpecError
from harness.pipeline import Pipe
from harness.spec import ImageSet
from harness.training import Run
from harness.unlearning import uce
from harness.unlearning.uce import edit, multiply, solved


@dataclass(frozen=True)
class Method:
    """RECE (Gong et al., 2024, "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models").

    After UCE's edit, `epochs` times: c' = argmin sum_l ||W_l c' - W_l^old c||^2 + gamma ||c'||^2 over all keys and
    values l, for every position of the concept's prompt; then UCE's edit of c' towards the guide's prompt, position
    by position. W stays W_old M with one M for all layers, so all of it happens to (d, d) matrices. No UNet pass.

    Reference: CharlesGong12/RECE@403a67f, whose edits look at the weights of the epoch before: they are what the
    ridge pulls to and whose values are targets (`ridge_to="current"`), so that the targets drift. "original" takes
    all from the weights before UCE, and edits the concept and everything derived from it at once. Differs from it:
    M is computed once and not per layer, in float64; it makes the UCE edit itself; no epoch is chosen by looking at images.
    """

    epochs: int = 3
    gamma: float = 0.1  # of ||c'||^2; the reference: 1e-1, for styles and hard objects 1e-3
    ridge_to: Literal["current", "original"] = "current"
    rece_ridge: float = 0.1  # lam of RECE's edits
    guide: str | None = None  # as in UCE, from here on
    tokens: Literal["tail", "last"] = "tail"
    prompts: Literal["name", "task"] = "name"
    erase: float = 1.0  # a
    preserve: float = 0.1  # b
    ridge: float = 0.5  # lam of the UCE edit
    seed: int = 0  # nothing is drawn

    version: ClassVar[int] = 1
    trains: ClassVar[str] = uce.Method.trains
    reads: ClassVar[tuple[str, ...]] = uce.Method.reads

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise SpecError(f"`epochs` must be at least 0 (UCE alone), got {self.epochs}")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """None: RECE reads text only."""
        return {}

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Multiply every key and value matrix by M, in place."""
        weights = list(pipe.parameters(self.trains).values())
        first = uce.Method(self.guide, self.tokens, self.prompts)
        pairs = first.pairs(pipe, task)
        prompts, wanted = (pipe.words(side).double().cpu().flatten(0, 1) for side in zip(*pairs, strict=True))
        moved, kept = first.moved(pipe, pairs), first.kept(pipe, task.retain.concepts)
        multiply(weights, self.matrix(*moved, kept, prompts, wanted, weights))

    def matrix(self, c: Tensor, c_star: Tensor, kept: Tensor, prompts: Tensor, wanted: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """M (d, d): UCE's vectors (n, d), the kept ones (m, d), and all positions of the prompts and of the guide's (p, d)."""
        m = edit(c, c_star, kept, self.erase, self.preserve, self.ridge)
        gram = squares(weights) if self.epochs else m
        for _ in range(self.epochs):
            found = derived(m, gram, prompts, self.gamma)
            if self.ridge_to == "current":
                m = m @ edit(found, wanted, kept, self.erase, self.preserve, self.rece_ridge)
            else:
                c, c_star = torch.cat([c, found]), torch.cat([c_star, wanted])
                m = edit(c, c_star, kept, self.erase, self.preserve, self.rece_ridge)
        return m


def squares(weights: Sequence[Tensor]) -> Tensor:
    """S = sum_l W_l^T W_l (d, d), in float64 on the CPU."""
    total = torch.zeros(weights[0].shape[1], weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    with torch.no_grad():
        for weight in weights:
            total.addmm_(weight.double().T, weight.double())
    return total.cpu()


def derived(m: Tensor, gram: Tensor, c: Tensor, gamma: float) -> Tensor:
    """c' (n, d), what the weights W_old M take for c (n, d): (M^T S M + gamma I)^-1 M^T S c, with S = `gram`."""
    pull = m.T @ gram
    system = pull @ m + gamma * torch.eye(len(m), dtype=torch.float64)
    return solved(system, pull @ c.T, "gamma").T
