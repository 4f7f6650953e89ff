"""UCE: a closed-form edit of the cross-attention keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import PreconditionError, SpecError
from harness.pipeline import Pipe
from harness.spec import ImageSet
from harness.training import Run


@dataclass(frozen=True)
class Method:
    """UCE (Gandikota et al., 2024, "Unified Concept Editing in Diffusion Models").

    Minimises a sum_E ||W c_i - W_old c*_i||^2 + b sum_P ||W c_j - W_old c_j||^2 + lam ||W - W_old||^2 over every key
    and value matrix W of the cross-attention. The optimum is W_old M with one matrix M for all of them
    (`edit`), solved once in float64. No UNet pass.

    Reference: rohitgandikota/unified-concept-editing@35e91e2 (2023, the paper's results: `tokens="tail"`) and
    @28c81ed (2025: `tokens="last"`, one vector per concept and "" not preserved). Differs from them: M is computed
    once and not per layer; the guide is the task's anchor unless given; the preserved names are the task's.
    """

    guide: str | None = None  # what the concept becomes; None: the task's anchor
    tokens: Literal["tail", "last"] = "tail"
    prompts: Literal["name", "task"] = "name"
    erase: float = 1.0  # a
    preserve: float = 0.1  # b
    ridge: float = 0.5  # lam
    seed: int = 0  # nothing is drawn

    version: ClassVar[int] = 1
    trains: ClassVar[str] = "unet.xattn_kv"
    reads: ClassVar[tuple[str, ...]] = ("erased", "anchor", "retain")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """None: UCE reads text only."""
        return {}

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Multiply every key and value matrix by M, in place."""
        guide = task.anchor.concepts[0] if self.guide is None else self.guide
        pairs = [pair for c in task.erased.concepts for pair in self._pairs(task, c, guide)]
        vectors = [self._paired(pipe, concept, wanted) for concept, wanted in pairs]
        c, c_star = (torch.cat(side) for side in zip(*vectors, strict=True))
        m = edit(c, c_star, self._preserved(pipe, task.retain.concepts), self.erase, self.preserve, self.ridge)
        with torch.no_grad():
            for weight in pipe.parameters(self.trains).values():
                weight.copy_(weight.double() @ m.to(weight.device))

    def _pairs(self, task: Any, concept: str, guide: str) -> list[tuple[str, str]]:
        if self.prompts == "name":
            return [(concept, guide)]
        return [(p.replace("{}", concept), p.replace("{}", guide)) for p in task.erased.prompts]

    def _paired(self, pipe: Pipe, concept: str, guide: str) -> tuple[Tensor, Tensor]:
        """Vectors to move and where to, (n, d) each, aligned at the last word piece of both prompts."""
        if torch.equal(pipe.tokens(concept), pipe.tokens(guide)):
            raise SpecError(f"the concept '{concept}' is its own guide; choose another `guide`")
        e, e_star = pipe.encode([concept, guide]).double().cpu()
        i, j = last_word(pipe, concept), last_word(pipe, guide)
        length = 1 if self.tokens == "last" else len(e) - max(i, j)
        return e[i : i + length], e_star[j : j + length]

    def _preserved(self, pipe: Pipe, concepts: Sequence[str]) -> Tensor:
        """Vectors to keep (n, d)."""
        if self.tokens == "last":
            return torch.stack([pipe.encode([c])[0, last_word(pipe, c)] for c in concepts]).double().cpu()
        return pipe.encode(["", *concepts]).double().cpu().flatten(0, 1)


def last_word(pipe: Pipe, prompt: str) -> int:
    """Position of the prompt's last word piece; 0, the start token, where there is none."""
    return len(pipe.tokenizer(prompt).input_ids) - 2


def edit(c: Tensor, c_star: Tensor, kept: Tensor, a: float, b: float, lam: float) -> Tensor:
    """M (d, d) of UCE's optimum W = W_old M, from concept vectors (n, d), their targets (n, d), kept vectors (m, d).

    M = (lam I + a sum c* c^T + b sum k k^T)(lam I + a sum c c^T + b sum k k^T)^-1, in float64.
    """
    ground = lam * torch.eye(c.shape[1], dtype=torch.float64) + b * kept.T @ kept
    system = ground + a * c.T @ c
    solution, info = torch.linalg.solve_ex(system, (ground + a * c_star.T @ c).T)  # the system is symmetric
    if info != 0 or not torch.isfinite(solution).all():
        raise PreconditionError("UCE's linear system is singular; raise `ridge` above 0")
    return solution.T
