"""Did the diagnosis rank the cells as the measurement did? Spearman's correlation of predicted and measured rise."""

from __future__ import annotations

from collections.abc import Sequence

from harness.spec import Claim
from reports import words

LEAST, DRAWS, ALPHA = 4, 1000, 0.05  # cells; resamples; two-sided error


def ranking(claims: Sequence[Claim]) -> str | None:
    """One sentence, or None without `--diagnose`. The interval draws the concepts again, since cells of one concept belong together."""
    cells = [c for c in claims if {"predicted", "measured"} <= set(c.diagnosis)]
    if not any(c.diagnosis for c in claims):
        return None
    if len(cells) < LEAST:
        return f"diagnosis: {len(cells)} cells have a prediction; a rank correlation needs {LEAST}"
    import numpy as np
    from scipy.stats import spearmanr  # type: ignore[import-untyped]  # scipy ships no stubs

    table = np.array([[c.diagnosis["predicted"], c.diagnosis["measured"]] for c in cells])
    if (np.ptp(table, axis=0) == 0).any():
        return f"diagnosis: all {len(cells)} cells have the same predicted or measured rise; there is nothing to rank"
    names, rng = [c.concept for c in cells], np.random.default_rng(0)
    places = [[i for i, each in enumerate(names) if each == name] for name in dict.fromkeys(names)]
    drawn = (np.concatenate([places[i] for i in rng.integers(len(places), size=len(places))]) for _ in range(DRAWS))
    found = [spearmanr(table[rows]).statistic for rows in drawn if not (np.ptp(table[rows], axis=0) == 0).any()]
    low, high = np.quantile(found, [ALPHA / 2, 1 - ALPHA / 2])
    value = spearmanr(table).statistic
    where = f"[{words.short(float(low))}, {words.short(float(high))}], drawing {len(places)} concepts again"
    return f"diagnosis: rank correlation of predicted and measured rise {words.short(float(value))} over {len(cells)} cells, {where}"
