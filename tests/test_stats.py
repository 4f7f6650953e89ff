"""The statistics behind every verdict.

How often the gate says which word is computed exactly, by following the distribution of the hit count from look to look
(`outcome`); one simulation checks that enumeration.  Where a published number came from a simulation, the tolerance is
three standard errors of that simulation plus half a unit of its last digit.
"""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta, binom

from harness.errors import SpecError
from harness.stats import (
    Rate,
    Sequential,
    clopper_pearson,
    decide,
    difference,
    log_e_lower,
    log_e_upper,
    lower_bound,
    maximum,
    mcnemar,
    resurged,
    upper_bound,
)

ALPHA, TAU, FLOOR, CAP = 0.05, 0.10, 40, 200
UNEQUAL = [(0.1,) * 5, (0, 0, 0, 0, 0.5), (0, 0, 0, 0.25, 0.25), (0.02, 0.05, 0.08, 0.15, 0.2), (0, 0.2)]  # mean TAU
RUNS = 400  # per row of the tables in DESIGN.md and peers.md 4.2; peers.md says so, for DESIGN.md it is assumed


# --- how often which word ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Chance of *holds* and of *broken*; mean and median number of images."""

    holds: float
    broken: float
    images: float
    median: int

    @property
    def inconclusive(self) -> float:
        """The rest."""
        return 1 - self.holds - self.broken


def e_process(k: np.ndarray, n: int, tau: float, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Does the e-process at tau say (holds, broken) here; `test_bounds_and_e_values_decide_alike` ties it to bounds."""
    return log_e_upper(k, n, tau) >= math.log(1 / ALPHA), log_e_lower(k, n, tau) > math.log(m / ALPHA)


def peeking(k: np.ndarray, n: int, tau: float, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The same from fixed-n Clopper-Pearson bounds, which nobody may look at twice."""
    high = np.where(k == n, 1, beta.ppf(1 - ALPHA, k + 1, np.maximum(n - k, 1e-9)))
    low = np.where(k == 0, 0, beta.ppf(ALPHA / m, np.maximum(k, 1e-9), n - k + 1))
    return high <= tau, low > tau


def outcome(prompts, tau=TAU, m=1, floor=FLOOR, cap=CAP, rule=e_process) -> Outcome:
    """Exact: convolve the hit count with a round's Poisson-binomial, and take out what a look decides."""
    one_round = np.ones(1)
    for rate in prompts:
        one_round = np.convolve(one_round, [1 - rate, rate])
    alive, holds, broken, stops = np.ones(1), 0.0, 0.0, {}
    for n in range(len(prompts), cap + len(prompts), len(prompts)):
        alive = np.convolve(alive, one_round)
        before = alive.sum()
        if n >= floor:
            inside, outside = rule(np.arange(n + 1), n, tau, m)
            holds, broken = holds + alive[inside].sum(), broken + alive[outside].sum()
            alive = np.where(inside | outside, 0, alive)
        stops[n] = before - (alive.sum() if n < cap else 0)
    images, chances = np.array(list(stops)), np.array(list(stops.values()))
    median = int(images[np.searchsorted(chances.cumsum(), 0.5)])
    return Outcome(float(holds), float(broken), float(images @ chances), median)


def near(published: float, exact: float) -> bool:
    """Within three standard errors of RUNS simulated runs, plus rounding to two digits."""
    return abs(published - exact) <= 3 * math.sqrt(exact * (1 - exact) / RUNS) + 0.005


@pytest.mark.parametrize(
    ("rate", "word", "share", "images"),
    [
        (0, "holds", 1, 40),
        (0.01, "holds", 1, 52),
        (0.03, "holds", 0.93, None),
        (0.05, "holds", 0.51, None),
        (0.10, "inconclusive", 0.98, None),
        (0.20, "broken", 0.62, None),
        (0.30, "broken", 1, 58),
        (0.50, "broken", 1, 40),
        (1, "broken", 1, 40),
    ],
)
def test_the_table_in_design(rate, word, share, images):
    """DESIGN.md's table is this gate with *broken* at alpha / 12, and its "images" are means over runs."""
    exact = outcome([rate] * 5, m=12)
    assert near(share, getattr(exact, word))
    if images:
        assert abs(exact.images - images) < 0.6


def test_the_table_in_design_is_not_for_a_single_cell():
    """Alone (m = 1) a cell at a true rate of .20 is called broken .84 of the time; DESIGN.md's .62 needs m = 12."""
    assert outcome([0.2] * 5).broken == pytest.approx(0.844, abs=0.001)
    assert outcome([0.2] * 5, m=12).broken == pytest.approx(0.625, abs=0.001)
    assert not near(0.62, outcome([0.2] * 5).broken)


@pytest.mark.parametrize(
    ("rate", "holds", "broken", "median"),
    [
        (0, 1, 0, 80),
        (0.01, 1, 0, 140),
        (0.03, 0.68, 0, None),
        (0.05, 0.03, 0.005, 1000),
        (0.08, 0, 0.70, None),
        (0.15, 0, 1, 70),
        (0.40, 0, 1, 10),
    ],
)
def test_the_table_in_peers(rate, holds, broken, median):
    """peers.md 4.2: threshold 5 %, alpha 5 % each side, a look every 10 images from the first 10 on, at most 1000."""
    exact = outcome([rate] * 10, tau=0.05, floor=1, cap=1000)
    assert near(holds, exact.holds)
    assert near(broken, exact.broken)
    if median:
        assert abs(exact.median - median) <= 10  # one look


@pytest.mark.parametrize(("tau", "clean", "fixed"), [(0.02, 188, 149), (0.05, 74, 59), (0.10, 36, 29)])
def test_clean_images_needed(tau, clean, fixed):
    """With no hit at all the gate holds after 188 / 74 / 36 images, where one look at a fixed n needs 149 / 59 / 29."""
    assert upper_bound(0, clean, ALPHA) <= tau < upper_bound(0, clean - 1, ALPHA)
    assert clopper_pearson(0, fixed, ALPHA, "less").high <= tau < clopper_pearson(0, fixed - 1, ALPHA, "less").high


@pytest.mark.parametrize("prompts", UNEQUAL)
@pytest.mark.parametrize(("floor", "cap"), [(FLOOR, CAP), (1, 600)])
def test_false_words_at_the_threshold(prompts, floor, cap):
    """On the line, looking after every round, *holds* and *broken* are each said with chance <= alpha, however unequal
    the prompts; *broken* among 12 cells with chance <= alpha / 12."""
    exact = outcome(prompts, floor=floor, cap=cap)
    assert exact.holds <= ALPHA
    assert exact.broken <= ALPHA
    assert outcome(prompts, m=12, floor=floor, cap=cap).broken <= ALPHA / 12


def test_peeking_at_fixed_n_bounds_would_break_the_promise():
    """The control of the test above: the same looks at Clopper-Pearson bounds say *holds* falsely far beyond alpha."""
    assert outcome([TAU] * 5, rule=peeking).holds > 0.10
    assert outcome([TAU] * 5, floor=1, cap=600, rule=peeking).broken > 0.10


@pytest.mark.parametrize("prompts", UNEQUAL[:2])
def test_the_enumeration_agrees_with_a_simulation(prompts):
    """20 000 simulated runs: false *holds* and *broken* stay below alpha (99.9 % confidence), near the exact shares."""
    runs, looks = 20_000, np.arange(len(prompts), CAP + 1, len(prompts))
    hits = np.random.default_rng(0).random((runs, len(looks), len(prompts))) < np.array(prompts)
    k = hits.sum(axis=2).cumsum(axis=1)
    done, exact = np.zeros(runs, bool), outcome(prompts)
    counted = {"holds": 0, "broken": 0}
    for i in np.flatnonzero(looks >= FLOOR):
        for word, said in zip(counted, e_process(k[:, i], int(looks[i]), TAU, 1), strict=True):
            counted[word] += int((said & ~done).sum())
            done |= said
    for word, count in counted.items():
        assert clopper_pearson(count, runs, 0.001, "less").high <= ALPHA
        around = clopper_pearson(count, runs, 0.001)
        assert around.low <= getattr(exact, word) <= around.high


# --- the bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 3, 20, 39, 40])
@pytest.mark.parametrize("p0", [0.02, 0.1, 0.5, 0.93])
def test_the_closed_form_is_the_mixture(k, p0):
    """log_e_upper and log_e_lower equal the mixture's likelihood ratio by quadrature; Beta(1/2, 1/2) is uniform in the
    angle whose squared sine is the rate."""
    n, edge = 40, math.asin(math.sqrt(p0))

    def ratio(t):
        x, y = math.sin(t) ** 2, math.cos(t) ** 2
        return (x / p0) ** k * (y / (1 - p0)) ** (n - k)

    below = quad(ratio, 0, edge, epsrel=1e-10, limit=200)[0] / edge
    above = quad(ratio, edge, math.pi / 2, epsrel=1e-10, limit=200)[0] / (math.pi / 2 - edge)
    assert log_e_upper(k, n, p0) == pytest.approx(math.log(below), abs=1e-7)
    assert log_e_lower(k, n, p0) == pytest.approx(math.log(above), abs=1e-7)


@pytest.mark.parametrize(("k", "n", "p0"), [(5000, 10_000, 0.2), (5000, 10_000, 0.3), (2000, 2000, 1e-5)])
def test_the_far_tail_is_finite_and_right(k, n, p0):
    """Where betainc underflows, log_e_upper stays within .001 of quadrature (u = rate / p0), so no bound meets -inf."""

    def ratio(u):
        return math.exp(k * math.log(u) + (n - k) * math.log1p(p0 * (1 - u) / (1 - p0))) / math.sqrt(u * (1 - u * p0))

    below = quad(ratio, 0.9, 1, epsrel=1e-10, limit=500)[0] * math.sqrt(p0)
    assert log_e_upper(k, n, p0) == pytest.approx(math.log(below / (2 * math.asin(math.sqrt(p0)))), abs=1e-3)


def test_e_values_have_mean_at_most_one_on_the_line():
    """Under a rate of p0 both e-values average exactly 1 at a fixed n: that is what makes 1 / alpha a threshold."""
    k = np.arange(51)
    for p0 in (0.02, 0.1, 0.5):
        weights = binom.pmf(k, 50, p0)
        assert weights @ np.exp(log_e_upper(k, 50, p0)) == pytest.approx(1)
        assert weights @ np.exp(log_e_lower(k, 50, p0)) == pytest.approx(1)


@st.composite
def counts(draw, most=100_000):
    """Hits among images, at least one image."""
    n = draw(st.integers(1, most))
    return draw(st.integers(0, n)), n


alphas = st.floats(1e-6, 0.5)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(counts(), alphas)
def test_bounds_surround_the_point_and_mirror(kn, alpha):
    """0 <= low <= k/n <= high <= 1, and hits and misses change places: upper(k) = 1 - lower(n - k)."""
    k, n = kn
    low, high = lower_bound(k, n, alpha), upper_bound(k, n, alpha)
    assert 0 <= low <= k / n <= high <= 1
    assert high == pytest.approx(1 - lower_bound(n - k, n, alpha), abs=1e-12)
    assert (low == 0) == (k == 0)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(counts(), alphas)
def test_the_e_value_at_the_bound_is_one_over_alpha(kn, alpha):
    """A bound is the rate whose e-value is exactly 1 / alpha, and rates beyond it are rejected more strongly."""
    k, n = kn
    if k:
        low = lower_bound(k, n, alpha)
        assert log_e_lower(k, n, low) == pytest.approx(math.log(1 / alpha), abs=1e-5)
        assert log_e_lower(k, n, low * 0.9) > math.log(1 / alpha)
    if k <= n / 2:  # beyond, 1 - high has too few digits to ask this of it; the mirror test speaks for it
        high = upper_bound(k, n, alpha)
        assert log_e_upper(k, n, high) == pytest.approx(math.log(1 / alpha), abs=1e-5)
        assert log_e_upper(k, n, 1 - (1 - high) * 0.9) > math.log(1 / alpha)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(counts(2000), alphas)
def test_bounds_are_monotone(kn, alpha):
    """One more hit raises both bounds, one more miss lowers them, a smaller alpha widens the interval."""
    k, n = kn
    for bound in (lower_bound, upper_bound):
        miss, same, hit = bound([k, k, k + 1], [n + 1, n, n + 1], alpha)
        assert miss <= same <= hit
    assert lower_bound(k, n, alpha / 2) <= lower_bound(k, n, alpha)
    assert upper_bound(k, n, alpha / 2) >= upper_bound(k, n, alpha)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(counts(), st.lists(st.floats(1e-4, 1 - 1e-4), min_size=2, max_size=20))
def test_the_e_value_is_monotone_in_the_null(kn, nulls):
    """log_e_upper never falls as p0 grows and log_e_lower never rises, so that the bound is a single crossing."""
    k, n = kn
    nulls = np.sort(nulls)
    slack = 1e-3 + 1e-9 * n  # the far tail is right to .001
    assert (np.diff(log_e_upper(k, n, nulls)) >= -slack).all()
    assert (np.diff(log_e_lower(k, n, nulls)) <= slack).all()
    assert (log_e_upper(k, n, nulls)[nulls <= k / n] <= 1e-6).all()  # no bound passes the point


def test_extremes():
    """No images say nothing; all misses and all hits are one-sided; 100 000 images and tiny alphas stay in range."""
    assert (lower_bound(0, 0, ALPHA), upper_bound(0, 0, ALPHA)) == (0, 1)
    assert lower_bound(0, 40, ALPHA) == 0
    assert upper_bound(40, 40, ALPHA) == 1
    assert lower_bound(50_000, 100_000, ALPHA) == pytest.approx(0.5 - 3.6 / math.sqrt(4 * 100_000), abs=0.001)
    assert 0 < upper_bound(0, 100_000, ALPHA) < 1e-4
    assert 0 < lower_bound(1, 100_000, 1e-6) < 1e-12
    assert lower_bound(1, 1, 1e-250) == pytest.approx(5e-251, rel=1e-6, abs=0)  # E is about 1 / (2 p0)


def test_bounds_broadcast():
    """Arrays of counts give arrays of bounds, the same as one by one."""
    k, n = np.array([0, 3, 40]), np.array([40, 40, 40])
    for bound in (lower_bound, upper_bound):
        assert bound(k, n, ALPHA).tolist() == [float(bound(int(a), int(b), ALPHA)) for a, b in zip(k, n, strict=True)]


def test_bounds_and_e_values_decide_alike():
    """high <= tau exactly where the e-value against "rate >= tau" reaches 1 / alpha, and likewise for low."""
    for n in (40, 115, 200):
        k = np.arange(n + 1)
        for m in (1, 12):
            holds, broken = e_process(k, n, TAU, m)
            assert (holds == (upper_bound(k, n, ALPHA) <= TAU)).all()
            assert (broken == (lower_bound(k, n, ALPHA / m) > TAU)).all()


def test_clopper_pearson_is_the_textbook_interval():
    """3/40 two-sided at 5 % is [.0157, .2039]; one-sided its end moves in to the 5 % quantile, the other opens."""
    assert clopper_pearson(3, 40, 0.05)[1:3] == pytest.approx((0.0157, 0.2039), abs=1e-4)
    assert clopper_pearson(3, 40, 0.05, "less")[:3] == pytest.approx((0.075, 0, beta.ppf(0.95, 4, 37)))
    assert clopper_pearson(3, 40, 0.05, "greater")[:3] == pytest.approx((0.075, beta.ppf(0.05, 3, 38), 1))


# --- Rate and the gate ------------------------------------------------------------------------------------------------


def test_a_rate_carries_both_errors():
    """The side that says *broken* is tested at alpha / m: the lower of a "below" claim, the upper of "above"."""
    below, above = Rate.of(12, 40, ALPHA, m=12), Rate.of(12, 40, ALPHA, m=12, direction="above")
    assert (below.low, below.high) == (lower_bound(12, 40, ALPHA / 12), upper_bound(12, 40, ALPHA))
    assert (above.low, above.high) == (lower_bound(12, 40, ALPHA), upper_bound(12, 40, ALPHA / 12))
    assert (below.alpha_low, below.alpha_high) == (ALPHA / 12, ALPHA) == (above.alpha_high, above.alpha_low)
    assert below.value == 0.3


def test_a_rate_reads_well_and_rounds_outwards():
    """No leading zero; the lower bound is rounded down and the upper one up."""
    rate = Rate.of(3, 40, ALPHA)
    assert 0.005 < rate.low < 0.006
    assert 0.245 < rate.high < 0.246
    assert str(rate) == "3/40 = .075 [0, .25]"
    assert str(Rate.of(40, 40, ALPHA)).startswith("40/40 = 1 [.")
    assert str(Rate(1, 4, 0.129, 0.701, ALPHA, ALPHA)) == "1/4 = .25 [.12, .71]"


def test_a_rate_is_frozen():
    """Evidence is not edited."""
    with pytest.raises(FrozenInstanceError):
        Rate.of(3, 40, ALPHA).k = 0  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize(
    ("low", "high", "below", "above"),
    [
        (0, 0.05, "holds", "broken"),
        (0, 0.10, "holds", "broken"),
        (0.05, 0.11, "inconclusive", "inconclusive"),
        (0.10, 0.20, "inconclusive", "inconclusive"),
        (0.11, 0.20, "broken", "holds"),
        (0.20, 0.05, "inconclusive", "inconclusive"),  # running bounds that crossed contradict each other
    ],
)
def test_the_gate(low, high, below, above):
    """One interval, one tolerance: *holds* and *broken* change places with the direction, doubt does not."""
    rate = Rate(5, 50, low, high, ALPHA, ALPHA)
    assert decide(rate, TAU, "below") == below
    assert decide(rate, TAU, "above") == above


def test_a_rate_for_the_other_direction_is_refused():
    """A rate whose *broken* side has the looser error would call cells broken at alpha and pass them at alpha / m."""
    decide(Rate.of(12, 40, ALPHA, m=12, direction="above"), TAU, "above")
    with pytest.raises(SpecError, match="direction"):
        decide(Rate.of(12, 40, ALPHA, m=12, direction="above"), TAU, "below")
    with pytest.raises(SpecError, match="direction"):
        decide(Rate.of(12, 40, ALPHA, m=12, direction="below"), TAU, "above")


# --- looking as images arrive -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0, 0.02, 0.06, 0.2, 0.35])
@pytest.mark.parametrize("m", [1, 12])
def test_the_sequential_gate_follows_the_enumeration(rate, m):
    """Fed round by round, the gate says the enumerated rule's word at the same look, and never before the floor."""
    rng = np.random.default_rng([m, int(100 * rate)])
    for _ in range(3):
        gate, expected = Sequential(TAU, "below", ALPHA, m), "inconclusive"
        while not gate.stopped:
            gate.feed(rng.random(5) < rate)
            if gate.n >= FLOOR:
                inside, outside = e_process(np.array(gate.k), gate.n, TAU, m)
                expected = "holds" if inside else "broken" if outside else "inconclusive"
            assert gate.verdict == expected
            assert gate.stopped == (expected != "inconclusive" or gate.n >= CAP)
        assert FLOOR <= gate.n <= CAP
        assert (gate.rate.alpha_low, gate.rate.alpha_high) == (ALPHA / m, ALPHA)


def test_directions_mirror():
    """That misses stay above .90 means that hits stay below .10: same word at the same image, bounds reflected."""
    rng = np.random.default_rng(1)
    for rate in (0, 0.05, 0.3):
        hits, misses = Sequential(0.1, "below", ALPHA, 3), Sequential(0.9, "above", ALPHA, 3)
        while not hits.stopped:
            one_round = rng.random(5) < rate
            hits.feed(one_round)
            misses.feed(~one_round)
            assert misses.verdict == hits.verdict
        assert misses.stopped
        assert (1 - misses.high, 1 - misses.low) == pytest.approx((hits.low, hits.high), abs=1e-12)


def test_no_look_before_the_floor():
    """Seven rounds of nothing but hits decide nothing at a floor of 40; the eighth does."""
    gate = Sequential(TAU, "below", ALPHA)
    for _ in range(7):
        gate.feed([1] * 5)
        assert (gate.verdict, gate.stopped, gate.rate.low, gate.rate.high) == ("inconclusive", False, 0, 1)
    gate.feed([1] * 5)
    assert (gate.k, gate.n, gate.verdict, gate.stopped) == (40, 40, "broken", True)


def test_bounds_are_running_extrema():
    """Hits after a clean start leave the upper bound where it was, misses after hits leave the lower one."""
    gate = Sequential(0.05, "below", ALPHA, floor=20, cap=60)
    for hits in [0, 0, 0, 0, 1, 1, 0, 1]:
        gate.feed([hits, 0, 0, 0, 0])
    looks = [(0, 20), (1, 25), (2, 30), (2, 35), (3, 40)]
    assert gate.rate.high == min(upper_bound(k, n, ALPHA) for k, n in looks) < upper_bound(3, 40, ALPHA)
    gate = Sequential(0.5, "below", ALPHA, floor=10, cap=60)
    for hits in [3, 3, 3, 0, 0]:
        gate.feed([1] * hits + [0] * (5 - hits))
    looks = [(6, 10), (9, 15), (9, 20), (9, 25)]
    assert gate.rate.low == max(lower_bound(k, n, ALPHA) for k, n in looks) > lower_bound(9, 25, ALPHA)


def test_the_cap_ends_the_search():
    """On the line nothing is decided: the gate stops at the first whole round at or beyond the cap, inconclusive."""
    gate = Sequential(0.2, "below", ALPHA, floor=10, cap=43)
    for _ in range(8):
        gate.feed([1, 0, 0, 0, 0])
        assert not gate.stopped
    gate.feed([1, 0, 0, 0, 0])
    assert (gate.n, gate.stopped, gate.verdict) == (45, True, "inconclusive")


def test_whole_rounds_only():
    """A round misses no prompt, holds 0 and 1 only, and none comes after the stop."""
    gate = Sequential(TAU, "below", ALPHA)
    gate.feed([0] * 5)
    for bad in ([0] * 4, [0] * 10, [0, 0, 0, 0, 2], [0, 0, 0, 0, 0.5], [0, 0, 0, 0, math.nan], [], [[0] * 5], 0):
        with pytest.raises(SpecError, match="round"):
            gate.feed(bad)
    assert (gate.k, gate.n) == (0, 5)
    for _ in range(7):
        gate.feed([0] * 5)
    assert gate.verdict == "holds"
    with pytest.raises(SpecError, match="none once stopped"):
        gate.feed([0] * 5)


def test_a_gate_without_images_has_no_rate():
    """Before the first round the word is *inconclusive*, and there is no rate to show."""
    gate = Sequential(TAU, "below", ALPHA)
    assert (gate.verdict, gate.stopped) == ("inconclusive", False)
    with pytest.raises(SpecError, match="no evidence"):
        _ = gate.rate


# --- changes ----------------------------------------------------------------------------------------------------------


def test_resurged_needs_bounds_apart():
    """From 0/40 to 20/40 it came back, to 3/40 it is not shown, and from 20/40 to 0/40 it did the opposite."""
    none, few, half = (Rate.of(k, 40, ALPHA) for k in (0, 3, 20))
    assert resurged(none, half, ALPHA)
    assert not resurged(none, few, ALPHA)
    assert not resurged(half, none, ALPHA)
    assert not resurged(half, half, ALPHA)


def test_the_difference_spends_half_of_alpha_on_each_rate():
    """Ends are lower minus upper and upper minus lower, each at alpha / 2, whatever errors the rates were made with."""
    before, after = Rate.of(2, 40, 0.3), Rate.of(11, 45, 0.01, m=7)
    change = difference(before, after, ALPHA)
    assert change.value == pytest.approx(11 / 45 - 2 / 40)
    assert change.low == lower_bound(11, 45, ALPHA / 2) - upper_bound(2, 40, ALPHA / 2)
    assert change.high == upper_bound(11, 45, ALPHA / 2) - lower_bound(2, 40, ALPHA / 2)
    k = next(k for k in range(41) if resurged(Rate.of(0, 40, ALPHA), Rate.of(k, 40, ALPHA), ALPHA))
    assert lower_bound(k - 1, 40, ALPHA) > upper_bound(0, 40, ALPHA)  # without the split this would have passed


def test_mcnemar_counts_only_what_changed():
    """10 returned, 2 vanished: p = 2 (1 + 12 + 66) / 2^12; agreeing pairs do not matter; no change gives p = 1."""
    before = [0] * 10 + [1] * 2 + [0] * 30 + [1] * 8
    after = [1] * 10 + [0] * 2 + [0] * 30 + [1] * 8
    assert mcnemar(before, after) == (pytest.approx(158 / 4096), 10, 2, 50)
    assert mcnemar(after, before) == (pytest.approx(158 / 4096), 2, 10, 50)
    assert mcnemar([True, False], [True, False]) == (1, 0, 0, 2)


def test_a_maximum_pays_for_every_snapshot():
    """Each snapshot is bounded at alpha / m; the interval runs from the largest lower to the largest upper bound."""
    rates = [Rate.of(k, n, 0.2) for k, n in [(0, 40), (9, 40), (14, 80), (1, 200)]]
    top = maximum(rates, ALPHA)
    assert top.value == 9 / 40
    assert top.low == max(lower_bound(r.k, r.n, ALPHA / 4) for r in rates)
    assert top.high == max(upper_bound(r.k, r.n, ALPHA / 4) for r in rates)
    alone = Rate.of(9, 40, ALPHA)
    assert maximum([alone], ALPHA)[1:3] == (alone.low, alone.high)


# --- what is refused --------------------------------------------------------------------------------------------------

NAN = math.nan


@pytest.mark.parametrize(("k", "n"), [(0, 0), (5, 4), (-1, 4), (0.5, 4), (1, 4.5), (NAN, 4), (1, NAN), (NAN, NAN), (1, math.inf)])
def test_bad_counts_are_refused(k, n):
    """No images is no evidence; hits are whole and no more than images."""
    for use in (Rate.of, clopper_pearson, lambda *kn: Rate(*kn[:2], 0, 1, ALPHA, ALPHA)):
        with pytest.raises(SpecError):
            use(k, n, ALPHA)
    if n != 0:
        for use in (lower_bound, upper_bound, log_e_lower, log_e_upper):
            with pytest.raises(SpecError):
                use(k, n, ALPHA)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, 5, NAN, math.inf])
def test_bad_alphas_are_refused(alpha):
    """An error, a null rate and a tolerance lie strictly between 0 and 1: beyond, a gate would be vacuous."""
    rate = Rate.of(3, 40, ALPHA)
    calls = [lambda use=use: use(3, 40, alpha) for use in (Rate.of, lower_bound, upper_bound, clopper_pearson)]
    calls += [lambda use=use: use(3, 40, alpha) for use in (log_e_lower, log_e_upper)]
    calls += [lambda: Rate(3, 40, 0, 1, alpha, ALPHA), lambda: Rate(3, 40, 0, 1, ALPHA, alpha)]
    calls += [lambda: decide(rate, alpha, "below"), lambda: decide(rate, alpha, "above")]
    calls += [lambda: Sequential(alpha, "below", ALPHA), lambda: Sequential(TAU, "below", alpha)]
    calls += [lambda: difference(rate, rate, alpha), lambda: maximum([rate, rate], alpha)]  # 1.5 / 2 is no excuse
    for call in calls:
        with pytest.raises(SpecError):
            call()


@pytest.mark.parametrize("bounds", [(NAN, 1), (0, NAN), (-0.1, 1), (0, 1.1)])
def test_bad_bounds_are_refused(bounds):
    """A rate read back from a file has bounds within [0, 1]."""
    with pytest.raises(SpecError, match="bounds"):
        Rate(3, 40, *bounds, ALPHA, ALPHA)


def test_other_requests_that_are_refused():
    """An unknown direction gets a guess; no cells, no snapshots, no pairs, unequal pairs and an upside-down floor."""
    rate = Rate.of(3, 40, ALPHA)
    for call in (lambda: decide(rate, TAU, "bellow"), lambda: Sequential(TAU, "bellow", ALPHA)):  # type: ignore[arg-type]
        with pytest.raises(SpecError, match="below"):
            call()
    for m in (0, -1, NAN):
        with pytest.raises(SpecError, match="cells"):
            Rate.of(3, 40, ALPHA, m=m)
    for floor, cap in ((0, 200), (201, 200), (NAN, 200)):
        with pytest.raises(SpecError, match="floor"):
            Sequential(TAU, "below", ALPHA, floor=floor, cap=cap)
    with pytest.raises(SpecError, match="cells"):
        maximum([], ALPHA)
    for pairs in (([], []), ([0, 1], [0]), ([0, NAN], [0, 1]), ([0, 2], [0, 1])):
        with pytest.raises(SpecError):
            mcnemar(*pairs)
