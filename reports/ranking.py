"""Did the diagnosis rank the cells as the measurement did? Spearman's correlation of predicted and measured rise."""

from __future__ import annotations

from collections.abc import Sequence

from harness.spec import Claim
from reports import words

LEAST, DRAWS, ALPHA = 4, 1000, 0.05  # cells; resamples; two-sided error


def correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where there is nothing to rank: fewer than `LEAST` cells, or all alike in one of the two."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]  # scipy ships no stubs

    measured = [round(rise, 9) for rise in measured]  # differences of shares: .3 - .1 is .2
    alike = min(len(set(predicted)), len(set(measured))) < 2
    return None if alike or len(predicted) < LEAST else float(spearmanr(predicted, measured).statistic)


def ranking(claims: Sequence[Claim]) -> str | None:
    """One sentence, or None without `--diagnose`. The interval draws the concepts again, since cells of one concept belong together."""
    cells = [c for c in claims if {"predicted", "measured"} <= set(c.diagnosis)]
    if not any("measured" in c.diagnosis for c in claims):
        return None
    if len(cells) < LEAST:
        return f"diagnosis: {len(cells)} cells have a prediction; a rank correlation needs {LEAST}"
    import numpy as np

    table = np.array([[c.diagnosis["predicted"], c.diagnosis["measured"]] for c in cells])
    if (value := correlation(*table.T)) is None:
        return f"diagnosis: all {len(cells)} cells have the same predicted or measured rise; there is nothing to rank"
    names, rng = [c.concept for c in cells], np.random.default_rng(0)
    places = [[i for i, each in enumerate(names) if each == name] for name in dict.fromkeys(names)]
    drawn = (np.concatenate([places[i] for i in rng.integers(len(places), size=len(places))]) for _ in range(DRAWS))
    found = [each for rows in drawn if (each := correlation(*table[rows].T)) is not None]
    low, high = np.quantile(found, [ALPHA / 2, 1 - ALPHA / 2])
    where = f"[{words.short(float(low))}, {words.short(float(high))}], drawing {len(places)} concepts again"
    return f"diagnosis: rank correlation of predicted and measured rise {words.short(value)} over {len(cells)} cells, {where}"
