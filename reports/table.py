"""Claims put side by side: which cells belong together, the worst of them, and one row per method and fine-tune."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.spec import BROKEN, HOLDS, INCONCLUSIVE, INVALID, Claim, Numbers
from reports import words

WORST_FIRST = {BROKEN: 0, INVALID: 1, INCONCLUSIVE: 2, HOLDS: 3}
INSTRUMENTS, FORGOTTEN, RETAINED, STAYS = "instruments", "forgotten", "retained", "stays-forgotten"


@dataclass(frozen=True)
class Extreme:
    """The worst cell of several, with an interval for the worst rate itself and not just for that cell.

    Its ends are the most extreme of all the cells' ends: the end away from the tolerance is valid at alpha; the other
    as well where each cell's own bound was taken at alpha / m, as `harness.stats` does.
    """

    claim: Claim
    rate: Numbers


@dataclass(frozen=True)
class Row:
    """One method under one fine-tune: how well it forgot, what survived, and what came back."""

    method: str
    concepts: int
    steps: tuple[int, ...]  # the fixed snapshots
    base: Numbers | None  # the least drawn concept before unlearning
    forgot: float | None  # mean over the concepts right after unlearning
    forgot_worst: Extreme | None
    retained: Extreme | None
    back: float | None  # mean over the concepts at the last snapshot
    back_worst: Extreme | None
    counts: Mapping[str, int]

    @property
    def verdict(self) -> str:
        """The worst verdict of the row."""
        return min(self.counts, key=WORST_FIRST.__getitem__)


def extreme(claims: Iterable[Claim]) -> Extreme | None:
    """The cell furthest on the wrong side, among those that were measured."""
    cells = [(claim, claim.rate) for claim in claims if claim.rate is not None]
    if not cells:
        return None
    pick = max if cells[0][0].direction == "below" else min
    claim, rate = pick(cells, key=lambda cell: (cell[1]["value"], cell[1]["high"]))
    low, high = (pick(other["low"] for _, other in cells), pick(other["high"] for _, other in cells))
    return Extreme(claim, {**rate, "low": low, "high": high})


def failing(claims: Iterable[Claim]) -> list[Claim]:
    """The cells that do not hold, worst first."""
    return sorted((c for c in claims if c.verdict != HOLDS), key=severity)


def severity(claim: Claim) -> tuple[int, float]:
    """Sorting by it puts the broken before the unclear, and the far before the near."""
    value = claim.rate["value"] if claim.rate else 0.0
    return WORST_FIRST[claim.verdict], -value if claim.direction == "below" else value


def varying(claims: Sequence[Claim]) -> list[str]:
    """What differs within a report beside the recipe, and so has to be said."""
    return [name for name in ("suite", "task", "model") if len({getattr(c, name) for c in claims}) > 1]


def recipes(claims: Sequence[Claim], also: Sequence[str] = ()) -> dict[str, list[Claim]]:
    """Claims by what was done to the model, `also` saying what else to name.

    What was measured before any fine-tune belongs to all of a method's fine-tunes.
    """
    measured = [c for c in claims if c.claim != INSTRUMENTS]
    tuned = {words.recipe(c, also): c for c in measured if c.finetune or c.attack}
    plain = [c for c in measured if not any(_extends(head, c) for head in tuned.values())]
    heads = tuned | {words.recipe(c, also): c for c in plain}
    return {name: [c for c in measured if _extends(head, c)] for name, head in heads.items()}


def rows(claims: Sequence[Claim]) -> list[Row]:
    """The comparison: one row per recipe, in the order in which they were measured."""
    return [_row(name, cells) for name, cells in recipes(claims, varying(claims)).items()]


def _extends(head: Claim, claim: Claim) -> bool:
    """Whether `claim` is about the model of `head` or about that model before its fine-tune."""
    same = all(getattr(head, name) == getattr(claim, name) for name in ("suite", "task", "model", "method"))
    return same and (claim.finetune, claim.attack) in ((head.finetune, head.attack), (None, None))


def _row(name: str, cells: list[Claim]) -> Row:
    forgot, kept, back = ([c for c in cells if c.claim == slug] for slug in (FORGOTTEN, RETAINED, STAYS))
    steps = tuple(sorted({c.steps for c in back}))
    return Row(
        method=name,
        concepts=len({c.concept for c in forgot + back}),
        steps=steps,
        base=min((c.base for c in forgot + back if c.base), key=lambda rate: rate["value"], default=None),
        forgot=_mean(forgot),
        forgot_worst=extreme(forgot),
        retained=extreme(kept),
        back=_mean(c for c in back if c.steps == steps[-1]),
        back_worst=extreme(back),
        counts=Counter(c.verdict for c in cells),
    )


def _mean(claims: Iterable[Claim]) -> float | None:
    values = [claim.rate["value"] for claim in claims if claim.rate is not None]
    return sum(values) / len(values) if values else None
