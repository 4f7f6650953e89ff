"""MACE's closed forms: which token vectors meet, the refinement before the LoRAs and their fusion after.

Every sum over token vectors e (d,) enters through its Gram matrix sum e e^T (d, d), in float64, so that the memory does not
grow with the number of prompts; a LoRA enters the fusion through its two factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from harness.errors import PreconditionError, SpecError
from harness.pipeline import Pipe

CUT = 1e-12  # eigenvalues below this share of the largest are rounding, not directions
CHUNK = 64  # prompts encoded at once

# --- tokens ------------------------------------------------------------------------------------------------------


def span(pipe: Pipe, template: str, name: str) -> tuple[int, int, int]:
    """Where `name` stands in the tokens of its prompt: its first position, the one after its last, and that of the end token."""
    ids = pipe.tokenizer(template.replace("{}", name)).input_ids
    before, after = (len(pipe.tokenizer(part).input_ids) - 2 for part in template.split("{}"))
    first, behind = 1 + before, len(ids) - 1 - after
    if first >= behind or ids[first:behind] != pipe.tokenizer(name).input_ids[1:-1]:
        raise SpecError(f"prompt {template!r}: {name!r} does not keep its own tokens there; put spaces around '{{}}', or give the name as it is read")
    return first, behind, len(ids) - 1


def coexisting(pipe: Pipe, template: str, name: str, mapping: str) -> tuple[Tensor, Tensor]:
    """e^f and e^g (n, d): each token beside `name`, and the same token where `mapping` stands instead. The name's own are left out.

    What follows the name is aligned behind it, so at the end token, and goes on through the padding until one of the prompts is full.
    """
    first, f, _ = span(pipe, template, name)
    _, g, _ = span(pipe, template, mapping)
    e_f, e_g = pipe.words([template.replace("{}", each) for each in (name, mapping)]).double().cpu()
    behind = len(e_f) - max(f, g)
    return torch.cat([e_f[:first], e_f[f : f + behind]]), torch.cat([e_g[:first], e_g[g : g + behind]])


def gram(pipe: Pipe, prompts: Sequence[str]) -> Tensor:
    """sum e e^T (d, d) over all positions of all prompts."""
    total: Tensor | float = 0.0
    for start in range(0, len(prompts), CHUNK):
        e = pipe.words(prompts[start : start + CHUNK]).double().cpu().flatten(0, 1)
        total = total + e.T @ e
    return torch.as_tensor(total)


# --- stage 1 -----------------------------------------------------------------------------------------------------


def refinement(pairs: Iterable[tuple[Tensor, Tensor]], prior: Tensor, lam1: float, ridge: float) -> Tensor:
    """M (d, d) such that W' = W M minimises sum ||W' e^f - W e^g||^2 + lam1 sum_p ||W' p - W p||^2 + ridge ||W' - W||^2.

    `prior` is sum p p^T. M = I + sum (e^g - e^f) e^f^T S^+ with S = sum e^f e^f^T + lam1 prior + ridge I, which is the
    textbook solution wherever S can be inverted, and otherwise (lam1 = ridge = 0) the optimum nearest to W. The same M serves
    every matrix, because every target is W times something.
    """
    eye = torch.eye(len(prior), dtype=torch.float64)
    shift, system = torch.zeros_like(eye), lam1 * prior + ridge * eye
    for e_f, e_g in pairs:
        shift += (e_g - e_f).T @ e_f
        system += e_f.T @ e_f
    return eye + shift @ inverse(system)


def inverse(system: Tensor) -> Tensor:
    """The pseudo-inverse of a symmetric positive semi-definite matrix."""
    if not torch.isfinite(system).all():
        raise PreconditionError("MACE's text embeddings are not finite; is the text encoder damaged, or lam1, lam2, lam3 or ridge far too large?")
    return torch.linalg.pinv(system, hermitian=True, rtol=CUT)


# --- stage 3 -----------------------------------------------------------------------------------------------------


class Fusion:
    """One weight for many LoRAs: the optimum W* of
    sum_i sum_j ||W* e_j - (W' + up_i down_i) e_j||^2 + lam2 sum_p ||W* p - W p||^2 + ridge ||W* - W'||^2.

    W* = W' + (sum_i up_i (down_i G_i) + lam2 (W - W') prior) S^+ with S = sum_i G_i + lam2 prior + ridge I. A concept leaves
    behind its share of S and, of each layer, rank x (d + d_out) numbers: 0.4 MB for SD 1.x at rank 1, 3.6 MB for SDXL. They have
    their place from the start: thousands of small tensors kept between large ones that go would tear the heap apart.
    """

    def __init__(self, prior: Tensor, lam2: float, ridge: float, shapes: Mapping[str, Sequence[int]], ranks: int) -> None:
        """`shapes` (d_out, d) of the layers by name; `ranks` is the sum of the ranks of all concepts' LoRAs."""
        self.pull = lam2 * prior  # of the original weights
        self.system = self.pull + ridge * torch.eye(len(prior), dtype=torch.float64)
        self.up = {name: torch.zeros(out, ranks, dtype=torch.float64) for name, (out, _) in shapes.items()}
        self.down = {name: torch.zeros(ranks, width, dtype=torch.float64) for name, (_, width) in shapes.items()}  # times G
        self.used = 0

    def add(self, gram: Tensor, loras: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """A concept: sum e e^T over its prompts, and its LoRA (up (d_out, r), down (r, d)) of each layer."""
        self.system += gram
        start = self.used
        for name, (up, down) in loras.items():
            self.used = start + len(down)
            self.up[name][:, start : self.used] = up
            self.down[name][start : self.used] = down.double().cpu() @ gram

    def weights(self, refined: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        """W* of every layer (name, float64), one at a time, from W' and W."""
        solution = inverse(self.system)
        for name, weight in refined.items():
            w = weight.detach().double().cpu()
            pulled = (original[name].double().cpu() - w) @ self.pull
            yield name, w + (self.up[name] @ self.down[name] + pulled) @ solution
