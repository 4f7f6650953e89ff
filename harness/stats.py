"""How sure are we: a rate with honest bounds, the gate that reads it, and changes between two rates.

A claim is about the mean hit rate over a *fixed prompt set*.  Its bounds stay true however often one looks, provided
one looks only after whole rounds (one new image per prompt): where prompts differ, a round multiplies the e-value by
factors linear in their rates, whose product AM-GM bounds by its value at their mean.

Sources: Ville 1939 (an e-process ever reaches 1/alpha with probability <= alpha), Robbins 1970 (mixtures of likelihood
ratios), Howard et al. 2021 (bounds that hold at all looks together), Waudby-Smith & Ramdas 2023 (inverting such tests
for a mean in [0, 1]).  At fixed n: Clopper & Pearson 1934, McNemar 1947.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # type: ignore[import-untyped]  # scipy ships no stubs

from harness.errors import SpecError, unknown

Floats = NDArray[np.float64]
Direction = Literal["below", "above"]  # the side of the tolerance on which the claim holds
Word = Literal["holds", "broken", "inconclusive"]  # the fourth, "invalid", is about preconditions: decided elsewhere
Side = Literal["two-sided", "less", "greater"]  # scipy's words: "less" bounds from above only, "greater" from below


class Interval(NamedTuple):
    """A point and its interval, made with error `alpha`: of each end, but of both together in `clopper_pearson`."""

    value: float
    low: float
    high: float
    alpha: float


class Paired(NamedTuple):
    """McNemar's table without its agreeing cells: of `n` pairs, `returned` went 0 -> 1 and `vanished` went 1 -> 0."""

    p: float
    returned: int
    vanished: int
    n: int


def log_e_upper(k: ArrayLike, n: ArrayLike, p0: ArrayLike) -> Floats:
    """Log e-value against "rate >= p0": Beta(1/2, 1/2) truncated to [0, p0), over the likelihood at p0 (Robbins)."""
    hits, images, p = _checked(k, n, p0, "p0")
    return _log_e(hits, images, p, np.log(p), np.log1p(-p))


def log_e_lower(k: ArrayLike, n: ArrayLike, p0: ArrayLike) -> Floats:
    """Log e-value against "rate <= p0": Beta(1/2, 1/2) truncated to (p0, 1], that is `log_e_upper` of the misses."""
    hits, images, p = _checked(k, n, p0, "p0")
    return _log_e(images - hits, images, 1 - p, np.log1p(-p), np.log(p))


def upper_bound(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Floats:
    """The largest p0 that `log_e_upper` does not reject at `alpha`: one-sided, true at any stopping time (Ville)."""
    hits, images, level = _checked(k, n, alpha, "alpha")
    return np.asarray(special.expit(_logit_bound(hits, images, level)))[()]


def lower_bound(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Floats:
    """The smallest p0 that `log_e_lower` does not reject at `alpha`: 1 - upper_bound(n - k, n), with digits near 0."""
    hits, images, level = _checked(k, n, alpha, "alpha")
    return np.asarray(special.expit(-_logit_bound(images - hits, images, level)))[()]


def clopper_pearson(k: int, n: int, alpha: float, side: Side = "two-sided") -> Interval:
    """Exact interval at an n fixed beforehand, for committed tables, never under stopping; Clopper & Pearson 1934."""
    _checked(k, n, alpha, "alpha", least=1)
    from scipy.stats import binomtest  # type: ignore[import-untyped]  # scipy ships no stubs; a second that a warm run saves

    ci = binomtest(int(k), int(n), alternative=side).proportion_ci(1 - alpha, method="exact")
    return Interval(k / n, float(ci.low), float(ci.high), alpha)


@dataclass(frozen=True)
class Rate:
    """`k` hits in `n` images: the true rate is below `low` with chance <= alpha_low, above `high` <= alpha_high."""

    k: int
    n: int
    low: float
    high: float
    alpha_low: float
    alpha_high: float

    def __post_init__(self) -> None:
        _checked(self.k, self.n, (self.alpha_low, self.alpha_high), "alpha", least=1)
        if not (0 <= self.low <= 1 and 0 <= self.high <= 1):  # nan fails too
            raise SpecError(f"bounds of a rate: got [{self.low}, {self.high}]; allowed: within [0, 1]; use Rate.of")

    @classmethod
    def of(cls, k: int, n: int, alpha: float, m: int = 1, direction: Direction = "below") -> Rate:
        """Bounds at one look: *holds* is tested at `alpha`, *broken*, said of one cell among `m`, at alpha / m."""
        at_low, at_high = _alphas(alpha, m, direction)
        low, high = float(lower_bound(k, n, at_low)), float(upper_bound(k, n, at_high))
        return cls(int(k), int(n), low, high, at_low, at_high)

    @property
    def value(self) -> float:
        """The share of hits, k / n: it decides nothing, and under stopping it is biased."""
        return self.k / self.n

    def __str__(self) -> str:
        """Like `3/40 = .075 [0, .25]`; bounds are rounded outwards, so that no digit claims more than was shown."""
        shown = self.value, np.floor(self.low * 100) / 100, np.ceil(self.high * 100) / 100
        value, low, high = (f"{x:.3f}".strip("0").rstrip(".") or "0" for x in shown)
        return f"{self.k}/{self.n} = {value} [{low}, {high}]"


def decide(rate: Rate, tolerance: float, direction: Direction) -> Word:
    """The gate: *holds* if the whole interval is on the claim's side, *broken* if it is on the other."""
    _checked(rate.k, rate.n, tolerance, "tolerance")
    below = _is_below(direction)
    if (rate.alpha_low > rate.alpha_high) if below else (rate.alpha_high > rate.alpha_low):
        raise SpecError(f"{rate}: got bounds for another direction; allowed: made for {direction!r}; see Rate.of")
    inside, outside = rate.high <= tolerance, rate.low > tolerance
    return ("holds" if inside == below else "broken") if inside != outside else "inconclusive"


@dataclass
class Sequential:
    """Images until the answer is clear: feed whole rounds, always the same prompts, until `stopped`; read `verdict`.

    Looks start at `floor` images.  Bounds are running extrema over the looks, which hold together (Howard et al. 2021).
    """

    tolerance: float
    direction: Direction
    alpha: float
    m: int = 1
    floor: int = 40
    cap: int = 200

    def __post_init__(self) -> None:
        self.k, self.n, self.low, self.high, self.width = 0, 0, 0.0, 1.0, 0  # width: images per round
        decide(Rate.of(0, 1, self.alpha, self.m, self.direction), self.tolerance, self.direction)  # checks these four
        if not 1 <= self.floor <= self.cap:
            raise SpecError(f"images to look at: got floor {self.floor}, cap {self.cap}; allowed: 1 <= floor <= cap")

    def feed(self, round_: ArrayLike) -> None:
        """Count one round, the 0/1 hits of one new image per prompt; look if the floor is reached."""
        hits = _hits(round_, "round")
        if self.stopped or self.width not in (0, hits.size):
            raise SpecError(f"round: got {hits.size} hits at n = {self.n}; allowed: {self.width}, none once stopped")
        self.k, self.n, self.width = self.k + int(hits.sum()), self.n + hits.size, hits.size
        if self.n >= self.floor:
            look = Rate.of(self.k, self.n, self.alpha, self.m, self.direction)
            self.low, self.high = max(self.low, look.low), min(self.high, look.high)

    @property
    def rate(self) -> Rate:
        """Counts so far, bounds over all looks so far ([0, 1] below the floor); an error before the first round."""
        return Rate(self.k, self.n, self.low, self.high, *_alphas(self.alpha, self.m, self.direction))

    @property
    def verdict(self) -> Word:
        """The gate's word so far."""
        return decide(self.rate, self.tolerance, self.direction) if self.n else "inconclusive"

    @property
    def stopped(self) -> bool:
        """The word is clear, or the cap is reached."""
        return self.n >= self.cap or self.verdict != "inconclusive"


def difference(before: Rate, after: Rate, alpha: float) -> Interval:
    """Rate after minus rate before; each end from two bounds at alpha / 2, both runs stopped at any time (Ville)."""
    half, _ = _alphas(alpha, 2, "below")
    b, a = (Rate.of(rate.k, rate.n, half) for rate in (before, after))
    return Interval(a.value - b.value, a.low - b.high, a.high - b.low, alpha)


def resurged(before: Rate, after: Rate, alpha: float) -> bool:
    """Did it come back: the lower bound after is above the upper bound before, alpha / 2 each (`difference`)."""
    return difference(before, after, alpha).low > 0


def mcnemar(before_hits: ArrayLike, after_hits: ArrayLike) -> Paired:
    """Exact two-sided test on the common prompt/seed prefix, its n fixed beforehand, not by stopping; McNemar 1947."""
    before, after = _hits(before_hits, "before_hits"), _hits(after_hits, "after_hits")
    if before.size != after.size:
        raise SpecError(f"pairs: got {before.size} hits before, {after.size} after; allowed: equal; cut to the prefix")
    returned, vanished = int((~before & after).sum()), int((before & ~after).sum())
    from scipy.stats import binomtest

    p = float(binomtest(returned, returned + vanished).pvalue) if returned + vanished else 1.0
    return Paired(p, returned, vanished, before.size)


def maximum(snapshots: Sequence[Rate], alpha: float) -> Interval:
    """The largest rate on a snapshot grid fixed beforehand: [max low, max high], each bound at alpha / snapshots."""
    each, _ = _alphas(alpha, len(snapshots), "below")
    rates = [Rate.of(rate.k, rate.n, each) for rate in snapshots]
    return Interval(max(r.value for r in rates), max(r.low for r in rates), max(r.high for r in rates), alpha)


def _log_e(k: Floats, n: Floats, p: Floats, log_p: Floats, log_q: Floats) -> Floats:
    """log of [int_0^p x^(a-1) (1-x)^(b-1) dx / int_0^p x^-1/2 (1-x)^-1/2 dx] / [p^k q^(n-k)], with q = 1 - p.

    Nondecreasing in p, so a bound is one crossing: the first integral over the likelihood is sqrt(pq) / a times
    2F1(n+1, 1; k+3/2; p), the second is this at k = n = 0, and the ratio of the two series' coefficients never falls
    (Biernacki & Krzyz 1955).  At most 1 if p <= k/n, so a bound never passes the point.
    """
    a, b = k + 0.5, n - k + 0.5
    mass = special.betainc(a, b, p)
    with np.errstate(divide="ignore", invalid="ignore"):  # np.where also computes the branch not taken
        far = 0.5 * (log_p + log_q) - np.log(a) - np.log1p(-(n + 1) * p / (a + 1))  # 37 sigma out: 2F1 is geometric
        ratio = np.where(mass < 1e-280, far, special.betaln(a, b) + np.log(mass) - k * log_p - (n - k) * log_q)
    return np.asarray(ratio - np.log(2 * np.arcsin(np.sqrt(p))))


def _logit_bound(k: Floats, n: Floats, alpha: Floats) -> Floats:
    """Logit of the upper bound by bisection; infinite if k = n, where no rate is too high."""
    low, high = np.full_like(k, -700.0), np.full_like(k, 700.0)
    for _ in range(64):  # 1400 / 2^64 is below rounding
        t = (low + high) / 2
        rejected = _log_e(k, n, special.expit(t), special.log_expit(t), special.log_expit(-t)) >= -np.log(alpha)
        low, high = np.where(rejected, low, t), np.where(rejected, t, high)
    return np.where(k == n, np.inf, high)


def _checked(k: ArrayLike, n: ArrayLike, x: ArrayLike, name: str, least: int = 0) -> tuple[Floats, Floats, Floats]:
    hits, images, inner = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (k, n, x)))
    whole = (hits == np.floor(hits)) & (images == np.floor(images)) & (images < np.inf)  # nan fails here and below
    if not np.all(whole & (hits >= 0) & (hits <= images) & (images >= least)):
        raise SpecError(f"{k!r} hits in {n!r} images; allowed: whole, hits <= images; no images is no evidence")
    if not np.all((inner > 0) & (inner < 1)):
        raise SpecError(f"{name}: got {x!r}; allowed: strictly between 0 and 1")
    return hits, images, inner


def _is_below(direction: str) -> bool:
    if direction not in get_args(Direction):
        raise unknown("direction", direction, get_args(Direction))
    return direction == "below"


def _alphas(alpha: float, m: int, direction: str) -> tuple[float, float]:
    if not (m >= 1 and 0 < alpha < 1):  # nan fails too
        raise SpecError(f"alpha for m cells: got alpha {alpha!r}, m {m!r}; allowed: 0 < alpha < 1 <= m")
    return (alpha / m, alpha) if _is_below(direction) else (alpha, alpha / m)  # (low, high); *broken* gets alpha / m


def _hits(values: ArrayLike, name: str) -> NDArray[np.bool_]:
    hits = np.asarray(values)
    if hits.ndim != 1 or not hits.size or not np.isin(hits, (0, 1)).all():
        raise SpecError(f"{name}: got {values!r}; allowed: a row of 0 and 1, one per image, not empty")
    return hits.astype(np.bool_)
