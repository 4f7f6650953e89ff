"""The resurgence curve as geometry: where each line, band and label goes. The template turns it into SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.spec import Claim, Numbers
from reports import table, words

WIDTH, HEIGHT = 420, 250  # user units of the viewBox; about pixels on a telephone
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 44
COLOURS, GAP = 6, 30  # colours in the page's palette; least distance between two labels on the x axis
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",  # circle
    "M-3.7-3.7h7.4v7.4h-7.4z",  # square
    "M0-5 4.7 3.6H-4.7z",  # triangle
    "M0-5.4 5 0 0 5.4-5 0z",  # diamond
    "M0 5 4.7-3.6H-4.7z",  # triangle, upside down
)  # one more or less than the colours, so that a colour and a shape meet again only after thirty lines

Rates = Mapping[int, Numbers]  # steps -> rate


@dataclass(frozen=True)
class Style:
    """How a line is told from the others: by colour and by shape."""

    colour: int
    shape: str

    @classmethod
    def of(cls, place: int) -> Style:
        """The style of the line in this place of the legend."""
        return cls(place % COLOURS, SHAPES[place % len(SHAPES)])


@dataclass(frozen=True)
class Mark:
    """A measured rate: its place, its interval's ends, and what to say when asked."""

    x: float
    y: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Line:
    """One recipe's rates over the fine-tuning steps."""

    label: str
    style: Style
    marks: tuple[Mark, ...]

    @property
    def path(self) -> str:
        """The points of the line, as SVG wants them."""
        return " ".join(f"{m.x:.1f},{m.y:.1f}" for m in self.marks)

    @property
    def band(self) -> str:
        """The outline of the interval: along the upper ends and back along the lower ones."""
        upper = [f"{m.x:.1f},{m.high:.1f}" for m in self.marks]
        return " ".join(upper + [f"{m.x:.1f},{m.low:.1f}" for m in reversed(self.marks)])


@dataclass(frozen=True)
class Curve:
    """A whole drawing. `tolerance` and `base` are heights, `limit` the tolerance in words; `base` is missing where it was not measured."""

    lines: tuple[Line, ...]
    ticks: tuple[tuple[float, int], ...]
    tolerance: float
    limit: str
    base: float | None
    description: str

    width, height, left, right, top, bottom = WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    rates = ((TOP, "1"), ((TOP + HEIGHT - BOTTOM) / 2, ".5"), (HEIGHT - BOTTOM, "0"))


def of(claims: Sequence[Claim], styles: Mapping[str, Style], names: Mapping[str, Sequence[Claim]]) -> Curve | None:
    """The curve of one concept, or None where nothing was measured. `names` are the recipes of these claims."""
    series = {name: found for name, cells in names.items() if (found := rates(cells))}
    if not series:
        return None
    steps = sorted({step for points in series.values() for step in points})
    judged = next(c for cells in names.values() for c in cells)
    base = next((c.base["value"] for c in claims if c.base), None)
    lines = [_line(name, points, styles[name], steps[-1], i, len(series)) for i, (name, points) in enumerate(series.items())]
    told = "; ".join(f"{name}: " + ", ".join(f"{short} at step {k}" for k, short in _said(p)) for name, p in series.items())
    return Curve(tuple(lines), _ticks(steps), _y(judged.tolerance), words.short(judged.tolerance), None if base is None else _y(base), told)


def rates(cells: Iterable[Claim]) -> Rates:
    """Rates by steps; where several claims measured one step (replicates), the worst of them."""
    by_steps: dict[int, list[Claim]] = {}
    before: dict[int, Numbers] = {}
    for claim in cells:
        if "figure" in (claim.rate or {}):  # such as FID, which has no place on this scale
            continue
        by_steps.setdefault(claim.steps, []).append(claim)
        if claim.before and claim.steps:
            before.setdefault(0, claim.before)
    worst = {steps: found.claim.rate for steps, same in by_steps.items() if (found := table.extreme(same))}
    return dict(sorted((before | {k: v for k, v in worst.items() if v}).items()))


def _line(name: str, points: Rates, style: Style, last: int, place: int, count: int) -> Line:
    nudge = (place - (count - 1) / 2) * min(4.0, 16 / count)  # so that equal rates of two lines stay visible
    marks = [Mark(_x(k, last) + nudge, _y(r["value"]), _y(r["low"]), _y(r["high"]), f"{name}, {k} steps: {words.share(r)}") for k, r in points.items()]
    return Line(name, style, tuple(marks))


def _said(points: Rates) -> list[tuple[int, str]]:
    return [(steps, words.short(rate["value"])) for steps, rate in points.items()]


def _ticks(steps: Sequence[int]) -> tuple[tuple[float, int], ...]:
    """Labels at the measured steps. The last is always there; of crowded ones, the earlier stays."""
    last = steps[-1]
    kept = [(_x(last, last), last)]
    left = _x(steps[0], last) - GAP
    for step in steps[:-1]:
        if (x := _x(step, last)) - left >= GAP and kept[0][0] - x >= GAP:
            kept.append((x, step))
            left = x
    return tuple(sorted(kept))


def _x(steps: int, last: int) -> float:
    inner = 14  # keeps the first and the last mark clear of the frame
    return LEFT + inner + (steps / last if last else 0.5) * (WIDTH - LEFT - RIGHT - 2 * inner)


def _y(rate: float) -> float:
    return TOP + (1 - rate) * (HEIGHT - TOP - BOTTOM)
