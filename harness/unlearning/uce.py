"""UCE: a closed-form edit of the cross-attention keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import PreconditionError
from harness.pipeline import Pipe
from harness.spec import ImageSet
from harness.training import Run
from harness.unlearning._concepts import distinct


@dataclass(frozen=True)
class Method:
    """UCE (Gandikota et al., 2024, "Unified Concept Editing in Diffusion Models").

    Minimises a sum_E ||W c_i - W_old c*_i||^2 + b sum_P ||W c_j - W_old c_j||^2 + lam ||W - W_old||^2 over every key
    and value matrix W of the cross-attention. The optimum is W_old M with one matrix M for all of them
    (`edit`), solved once in float64. No UNet pass.

    Reference: rohitgandikota/unified-concept-editing@35e91e2 (2023, the paper's results: `tokens="tail"`) and
    @28c81ed (2025: `tokens="last"`, one vector per concept and "" not preserved). Differs from them: M is computed
    once and not per layer; the guide is the task's anchor unless given; the preserved names are the task's. As in both,
    the guide "" stands for the start token's vector in `last`, and for the tail from there on in `tail`.
    """

    guide: str | None = None  # what the concept becomes; None: the task's anchor
    tokens: Literal["tail", "last"] = "tail"
    prompts: Literal["name", "task"] = "name"
    erase: float = 1.0  # a
    preserve: float = 0.1  # b
    ridge: float = 0.5  # lam
    seed: int = 0  # nothing is drawn

    version: ClassVar[int] = 2
    trains: ClassVar[str] = "unet.xattn_kv"
    reads: ClassVar[tuple[str, ...]] = ("erased", "anchor", "retain")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """None: UCE reads text only."""
        return {}

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Multiply every key and value matrix by M, in place."""
        weights = pipe.parameters(self.trains).values()
        c, c_star = self.moved(pipe, self.pairs(pipe, task))
        multiply(weights, edit(c, c_star, self.kept(pipe, task.retain.concepts), self.erase, self.preserve, self.ridge))

    def pairs(self, pipe: Pipe, task: Any) -> list[tuple[str, str]]:
        """What is asked about each concept, and the same about its guide."""
        guide = task.anchor.concepts[0] if self.guide is None else self.guide
        distinct(pipe, task.erased.concepts, (guide,), "guide")
        texts = ("{}",) if self.prompts == "name" else task.erased.prompts
        return [(text.replace("{}", concept), text.replace("{}", guide)) for concept in task.erased.concepts for text in texts]

    def moved(self, pipe: Pipe, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Vectors to move and where to, (n, d) each."""
        vectors = [self._aligned(pipe, *pair) for pair in pairs]
        c, c_star = (torch.cat(side) for side in zip(*vectors, strict=True))
        return c, c_star

    def _aligned(self, pipe: Pipe, concept: str, guide: str) -> tuple[Tensor, Tensor]:
        """One pair's vectors, aligned at the last word piece of both prompts."""
        e, e_star = pipe.words([concept, guide]).double().cpu()
        i, j = last_word(pipe, concept), last_word(pipe, guide)
        length = 1 if self.tokens == "last" else len(e) - max(i, j)
        return e[i : i + length], e_star[j : j + length]

    def kept(self, pipe: Pipe, concepts: Sequence[str]) -> Tensor:
        """Vectors to keep (n, d)."""
        if self.tokens == "last":
            return torch.stack([pipe.words([c])[0, last_word(pipe, c)] for c in concepts]).double().cpu()
        return pipe.words(["", *concepts]).double().cpu().flatten(0, 1)


def last_word(pipe: Pipe, prompt: str) -> int:
    """Position of the prompt's last word piece; 0, the start token, where there is none."""
    return len(pipe.tokenizer(prompt).input_ids) - 2


def edit(c: Tensor, c_star: Tensor, kept: Tensor, a: float, b: float, lam: float) -> Tensor:
    """M (d, d) of UCE's optimum W = W_old M, from concept vectors (n, d), their targets (n, d), kept vectors (m, d).

    M = (lam I + a sum c* c^T + b sum k k^T)(lam I + a sum c c^T + b sum k k^T)^-1, in float64, as
    I + a sum (c* - c) c^T (...)^-1: exactly I where nothing is to move.
    """
    eye = torch.eye(c.shape[1], dtype=torch.float64)
    system = lam * eye + b * kept.T @ kept + a * c.T @ c
    return eye + solved(system, a * c.T @ (c_star - c), "ridge").T


def solved(system: Tensor, right: Tensor, field: str) -> Tensor:
    """system^-1 right in float64, for a symmetric system (d, d) that the weight `field` makes positive definite."""
    singular = not torch.isfinite(system).all()
    if not singular:
        spectrum = torch.linalg.eigvalsh(system)  # a pivot of the factor can hide what rounding made of a zero
        singular = bool(spectrum[0] <= 10 * len(system) * torch.finfo(system.dtype).eps * spectrum[-1].abs())
    if singular:
        raise PreconditionError(f"the linear system is singular or not finite; raise `{field}` (far enough) above 0")
    return torch.cholesky_solve(right, torch.linalg.cholesky(system))


@torch.no_grad()
def multiply(weights: Iterable[Tensor], m: Tensor) -> None:
    """W <- W M for each matrix (out, d), in place."""
    for weight in weights:
        weight.copy_(weight.double() @ m.to(weight.device))
