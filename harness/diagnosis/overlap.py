"""Why it came back: do the gradients of harmless fine-tuning point back at what was unlearned?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity

from harness.data import Captioned
from harness.errors import SpecError
from harness.pipeline import Pipe

PARTS = tuple(f"{block} {kind}" for block in ("down", "mid", "up", "other") for kind in ("self-attention", "cross-attention", "other"))
BLOCKS = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}
KINDS = {"attn1": "self-attention", "attn2": "cross-attention"}


@dataclass(frozen=True)
class Overlap:
    """What the gradients at the unlearned weights say. `alignment`, `overlap` and `chance` have no unit; `predicted` is one number a step count.

    alignment: cosine of the mean gradients; above 0, a step of fine-tuning lowers the concept's loss: it relearns. `low` and `high` are the
    ends of its 95 % bootstrap interval over the gradients drawn (of the sketches).
    overlap: mean squared cosine of the principal angles of the two gradient subspaces, in [0, 1]; `chance` is its level for random ones.
    predicted: RS(k), the share of the erasure's gap that k fine-tuning steps close, to first order in the forget loss.
    carried: the share of <g_f, g_t> in each of PARTS; they sum to 1, and a part that works against relearning is below 0.
    orthogonal: the orthogonal term of meta-unlearning (arXiv 2410.12777, eq. 4 and Fig. 6) between the concept and the retained, with the
    ends of its interval: below 0, fine-tuning on the concept itself raises the retained's loss. None without cross-attention.
    """

    alignment: float
    low: float
    high: float
    overlap: float
    chance: float
    predicted: dict[int, float]
    carried: dict[str, float]
    orthogonal: tuple[float, float, float] | None = None


class Gradients(NamedTuple):
    """Gradients of L_DM over `count` draws: sketched `rows` (count, size), their `mean` (d,) in full, and in full (count, d_1) those of the `first`
    cross-attention layer, where there is one.
    """

    rows: Tensor
    mean: Tensor
    first: Tensor


def gradients(pipe: Pipe, data: Captioned, names: str, count: int, batch: int, size: int, seed: int = 0) -> Gradients:
    """`count` gradients of a parameter group, sketched to `size` numbers.

    The draws depend on the seed only, so that two data sets see the same timesteps, noise and places. One F + B each.
    """
    moving = pipe.parameters(names)
    layer = first_layer(list(moving))
    hashed = hashes(sum(p.numel() for p in moving.values()), size, seed)
    rows, first, mean = [], [], torch.zeros(len(hashed[0]))
    for i in range(count):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + i)
        loss = pipe.diffusion_loss(*data.batch(batch, rng), rng)
        each = [g.flatten().cpu() for g in torch.autograd.grad(loss, list(moving.values()), materialize_grads=True)]
        gradient = torch.cat(each)
        rows.append(sketch(gradient, size, hashed))
        first.append(torch.cat([torch.empty(0), *(g for name, g in zip(moving, each, strict=True) if name in layer)]))
        mean += gradient / count
    return Gradients(torch.stack(rows), mean, torch.stack(first))


def first_layer(names: Sequence[str]) -> list[str]:
    """The parameters of the first cross-attention layer, the one of Fig. 6; none where there is no cross-attention."""
    layers = [name.partition(".attn2.")[0] for name in names if ".attn2." in name]
    return [name for name in names if layers and name.startswith(f"{layers[0]}.attn2.")]


def hashes(dimension: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Where each of so many entries goes in a sketch of `size` numbers, and its sign."""
    rng = Generator().manual_seed(seed)
    bucket = torch.randint(size, (dimension,), generator=rng).int()
    return bucket, (torch.randint(2, (dimension,), generator=rng) * 2 - 1).to(torch.int8)


def sketch(row: Tensor, size: int, hashed: tuple[Tensor, Tensor]) -> Tensor:
    """Count sketch (size,) of a row (d,): every entry, with a sign, into one bucket. Inner products are kept on average."""
    bucket, sign = hashed
    return torch.zeros(size, dtype=row.dtype).index_add_(0, bucket, row * sign)


def subspace(rows: Tensor, energy: float = 0.95) -> Tensor:
    """Orthonormal basis (d, r) of the fewest right singular vectors that hold a share of the rows' energy."""
    _, s, v = torch.linalg.svd(rows.double(), full_matrices=False)
    held = s.square().cumsum(0) / s.square().sum()
    return v[: int((held < energy - 1e-12).sum()) + 1].T


def part(name: str) -> str:
    """Which of PARTS a parameter such as `unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight` belongs to."""
    words = name.split(".")
    block, kind = ([table[word] for word in words if word in table] for table in (BLOCKS, KINDS))
    return f"{(block or ['other'])[0]} {(kind or ['other'])[0]}"


def carried(names: Sequence[str], sizes: Sequence[int], g_f: Tensor, g_t: Tensor) -> dict[str, float]:
    """The share of <g_f, g_t> that each of PARTS contributes; gradients (d,) of parameters with these names and sizes, in this order."""
    shares = dict.fromkeys(PARTS, 0.0)
    for name, product in zip(names, (g_f * g_t).split(list(sizes)), strict=True):
        shares[part(name)] += float(product.sum())
    total = sum(shares.values()) or math.inf
    return {name: share / total for name, share in shares.items()}


def bootstrap(f: Tensor, t: Tensor, seed: int = 0, draws: int = 1000, alpha: float = 0.05) -> tuple[float, float]:
    """Percentile interval of the cosine of the mean rows of two samples (n, d) and (m, d), each drawn again with replacement."""
    rng = Generator().manual_seed(seed)
    means = [_drawn_again(rows, draws, rng) for rows in (f, t)]
    return _percentiles(cosine_similarity(means[0], means[1], dim=1), alpha)


def orthogonal(f: Tensor, r: Tensor, seed: int = 0, draws: int = 1000, alpha: float = 0.05) -> tuple[float, float, float]:
    """Mean of <g_f / |g_f|, g_r / |g_r|> over pairs of gradients (n, d) of one draw each, and its percentile interval over pairs drawn again.

    The orthogonal term of "Meta-Unlearning on Diffusion Models" (arXiv 2410.12777) as Fig. 6 shows it: eq. 4 adds tau zeta <g_F, g_r> to what
    is minimised, since a step -tau g_F on the concept changes the retained's loss by -tau <g_F, g_r>. Differs from it: at one
    model, with an interval over draws in place of a regression line over unlearning steps. A gradient of zero counts as 0.
    """
    each = cosine_similarity(f, r, dim=1)
    return float(each.mean()), *_percentiles(_drawn_again(each[:, None], draws, Generator().manual_seed(seed))[:, 0], alpha)


def _drawn_again(rows: Tensor, draws: int, rng: Generator) -> Tensor:
    """Mean rows (draws, d) of as many bootstrap samples of rows (n, d)."""
    weights = torch.stack([torch.bincount(torch.randint(len(rows), (len(rows),), generator=rng), minlength=len(rows)) for _ in range(draws)])
    return weights.to(rows) @ rows / len(rows)


def _percentiles(values: Tensor, alpha: float) -> tuple[float, float]:
    low, high = values.quantile(torch.tensor([alpha / 2, 1 - alpha / 2], dtype=values.dtype)).tolist()
    return low, high


def overlap(one: Tensor, two: Tensor) -> tuple[float, float]:
    """||U^T V||_F^2 / min(r_u, r_v) of two bases, and its chance level max(r_u, r_v) / d."""
    if one.shape[0] != two.shape[0]:
        raise SpecError(f"two subspaces of one space are needed, got {one.shape[0]} and {two.shape[0]} dimensions")
    small, large = sorted((one.shape[1], two.shape[1]))
    return float((one.T @ two).square().sum() / small), large / one.shape[0]


def reach(curvature: Tensor, lr: float, steps: int) -> Tensor:
    """f_k(l) = (1 - (1 - lr l)^k) / l: how far k steps of gradient descent go along a direction of curvature l; lr k where l is 0."""
    flat = curvature.abs() * lr < 1e-9
    return torch.where(flat, lr * steps, (1 - (1 - lr * curvature) ** steps) / torch.where(flat, 1.0, curvature))


def resurgence(g_f: Tensor, g_t: Tensor, curvature: Tensor, lr: float, steps: int, gap: float) -> float:
    """RS(k) = sum_j g_f,j f_k(F_j) g_t,j / gap, with a diagonal curvature F >= 0 of the fine-tuning loss; gap = L_f(unlearned) - L_f(base)."""
    if not gap > 0:
        raise SpecError(f"unlearning did not raise the concept's loss (by {gap:.3g}), so there is no gap to close")
    return float((g_f * reach(curvature.double(), lr, steps).to(g_f) * g_t).sum()) / gap


def diagnose(pipe: Pipe, f: Gradients, t: Gradients, r: Gradients, names: str = "unet", *, gap: float, lr: float, grid: Sequence[int] = (50, 200)) -> Overlap:
    """What the gradients of the concept, of fine-tuning and of the retained, of one parameter group and at the same draws, say of a model.

    The quadratic model behind it is derived here for the linear case that "concept resurgence" (arXiv 2410.08074, later
    versions) describes; it is exact for a linear denoiser under plain gradient descent. Its curvature is the
    empirical Fisher's mean diagonal, one number. The concept's images are those of the model before unlearning.
    """
    if len(f.rows) < 2:
        raise SpecError(f"a subspace of gradients needs at least 2 of them, got {len(f.rows)}")
    if not grid or min(grid) < 1:
        raise SpecError(f"the steps to predict must be at least 1, got {list(grid)}")
    share, chance = overlap(subspace(f.rows), subspace(t.rows))
    fisher = t.rows.square().sum(1).mean(0, keepdim=True) / len(t.mean)
    found = {k: resurgence(f.mean, t.mean, fisher, lr, k, gap) for k in grid}
    cosine = float(f.mean @ t.mean / (f.mean.norm() * t.mean.norm()).clamp(min=math.ulp(0)))
    moving = pipe.parameters(names)
    parts = carried(list(moving), [p.numel() for p in moving.values()], f.mean, t.mean)
    term = orthogonal(f.first, r.first) if f.first.numel() else None
    return Overlap(cosine, *bootstrap(f.rows, t.rows), share, chance, found, parts, term)
