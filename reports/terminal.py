"""The summary in the terminal: what was found, in words a newcomer understands, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from harness.spec import Claim
from reports import table, words
from reports.verdict import Report

MANY = 45  # claims; from here on, one line per method and fine-tune instead of one per concept
CAP = 12  # cells listed one by one
WIDTH = 28  # columns for a name


def summary(report: Report, page: str = "report.html") -> list[str]:
    """Plain lines without colour. `page` is where the whole report lies."""
    many = len(report.claims) >= MANY
    cells = _many(report.claims, page) if many else _few(report.claims)
    code = report.exit_code
    lines = [f"! {words.clean(notice)}" for notice in report.notices]
    lines += [*cells, f"{words.TITLES[code].upper()} (exit code {int(code)}): {words.clean(words.finding(report))}"]
    lines += _capped("why not a gate", report.deviations, page) + _capped("no verdict came from", report.missing, page)
    lines += [f"claims: {words.tally(report)}"] + ([f"measured: {words.clean(report.scope)}"] if report.scope else [])
    return [*lines, f"next: {words.advice(report)}"]


def _few(claims: Sequence[Claim]) -> list[str]:
    """One line per concept under each recipe, then the reasons of what does not hold."""
    lines = _instruments(claims)
    for name, cells in table.recipes(claims, table.varying(claims)).items():
        lines += ["", f"{words.clean(name)}: share of images that show the concept [bounds]"]
        lines += [_line(concept, cells) for concept in dict.fromkeys(c.concept for c in cells)]
    reasons = [f"  {_cell(c)}" for c in table.failing(claims) if c.reason]
    return [*lines, ""] + (["what does not hold:", *reasons[:CAP], ""] if reasons else [])


def _line(concept: str, cells: Sequence[Claim]) -> str:
    """Before unlearning -> right after it -> after the worst snapshot, and the worst verdict of all."""
    mine = [c for c in cells if c.concept == concept]
    tuned = [c for c in mine if c.steps]
    found = table.extreme(tuned)
    worst = min(mine, key=table.severity)
    base = next((c.base["value"] for c in mine if c.base), None)
    fresh = next((c.rate for c in mine if not c.steps), None) or next((c.before for c in mine if c.before), None)
    parts = [f"{words.short(base):>4} base", f"{words.short(fresh['value'] if fresh else None):>4} unlearned"]
    if found and found.claim.rate:
        parts.append(f"{_bracket(found.claim)} {words.after(found.claim)}")
    elif mine[0].rate:
        parts = [*parts[:1], f"{_bracket(mine[0])} unlearned"]
    return f"  {_name(concept)}  {' -> '.join(parts)}: {worst.word}"


def _bracket(claim: Claim) -> str:
    """The rate and its bounds without the counts, which the page has."""
    return words.share(claim.rate).split(" = ")[-1]


def _many(claims: Sequence[Claim], page: str) -> list[str]:
    """Two lines per recipe, then the cells that do not hold."""
    lines = _instruments(claims)
    for row in table.rows(claims):
        lines += ["", f"{words.clean(row.method)} ({row.concepts} concepts): {words.counted(row.counts)}"]
        lines += _pair("after unlearning", row.forgot, row.forgot_worst)
        lines += _pair(f"after {row.steps[-1]} steps", row.back, row.back_worst) if row.steps else []
        lines += _pair("retained", None, row.retained)
    bad = table.failing(claims)
    return [*lines, "", *_capped("what does not hold", [_cell(c) for c in bad], page), ""]


def _pair(when: str, mean: float | None, worst: table.Extreme | None) -> list[str]:
    if worst is None:
        return []
    said = f"mean {words.short(mean)}, " if mean is not None else ""
    where = f"{words.clean(worst.claim.concept)[:WIDTH]}, {words.after(worst.claim)}"
    return [f"  {when:<17} {said}worst {words.share(worst.rate)} ({where})"]


def _instruments(claims: Sequence[Claim]) -> list[str]:
    """Whether the measurement itself works; one line if it does."""
    mine = [c for c in claims if c.claim == table.INSTRUMENTS]
    bad = [_name(c.concept).strip() for c in table.failing(mine)]
    told = f"failed for {words.listed(bad)}" if bad else "the base model draws every concept and the detector sees it"
    return [f"instruments: {told}"] if mine else []


def _cell(claim: Claim) -> str:
    """One cell in one line."""
    what = f"{_name(claim.concept).strip()}, {words.clean(words.recipe(claim))}, {words.after(claim)}"
    reason = f" ({words.clean(claim.reason)})" if claim.reason else ""
    return f"{claim.word}: {what}: {words.share(claim.rate)}{reason}"


def _capped(title: str, items: Sequence[str], page: str) -> list[str]:
    """A titled list that never grows beyond the cap."""
    if not items:
        return []
    rest = [f"  and {len(items) - CAP} more, see {page}"] if len(items) > CAP else []
    return [f"{title}:", *(f"  {words.clean(item)}" for item in items[:CAP]), *rest]


def _name(concept: str) -> str:
    """A name in a column of fixed width, cut where it is too long."""
    text = words.clean(concept)
    return (text if len(text) <= WIDTH else text[: WIDTH - 3] + "...").ljust(WIDTH)
