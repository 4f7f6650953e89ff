"""The summary in the terminal: what was found, in words a newcomer understands, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from harness.spec import Claim, Numbers
from reports import table, words
from reports.ranking import ranking
from reports.verdict import Exit, Report

MANY = 150  # claims; from here on, two lines per recipe instead of one per claim
CAP = 12  # cells listed one by one
WIDTH = 28  # columns for a name


def summary(report: Report, page: str = "report.html") -> list[str]:
    """Plain lines without colour. `page` is where the whole report lies."""
    many = len(report.claims) >= MANY
    cells = _many(report.claims, page) if many else _few(report.claims)
    code = report.exit_code
    lines = [f"! {words.clean(notice)}" for notice in report.notices]
    lines += [*cells, *_side_by_side(report.claims)]
    lines += [words.clean(said), ""] if (said := ranking(report.claims)) else []
    lines += [f"{words.TITLES[code].upper()} (exit code {int(code)}): {words.clean(words.finding(report))}"]
    lines += _capped("why not a gate", report.deviations, page) + _capped("no verdict came from", report.missing, page)
    lines += [f"claims: {words.tally(report)}"] + ([f"measured: {words.clean(report.scope)}"] if report.scope else [])
    return [*lines, f"next: {words.advice(report)}"]


def _few(claims: Sequence[Claim]) -> list[str]:
    """One line per claim under its recipe, then the reasons of what does not hold."""
    lines, told = _instruments(claims), set[str]()
    for name, cells in table.recipes(claims, table.varying(claims)).items():
        fresh = [c for c in cells if c.id not in told]  # what was measured before any fine-tune is said once
        told.update(c.id for c in fresh)
        lines += ["", f"{words.clean(name)}: share of images that show the concept, or the figure named [bounds]"]
        lines += [_line(c, cells) for c in sorted(fresh, key=lambda c: c.claim == table.RETAINED)]
    reasons = [f"  {_cell(c)}" for c in table.failing(claims) if c.reason]
    return [*lines, ""] + (["what does not hold:", *reasons[:CAP], ""] if reasons else [])


def _line(claim: Claim, cells: Sequence[Claim]) -> str:
    """Before unlearning -> right after it -> after k steps, with bounds where the claim is, and the verdict."""
    told = claim.claim, claim.concept, claim.seeds.get("unlearn")
    plain = (c.rate for c in cells if not c.steps and (c.claim, c.concept, c.seeds.get("unlearn")) == told)
    fresh = (claim.before or next(plain, None)) if claim.steps else None
    parts = [f"{words.short(claim.base['value'] if claim.base else None):>4} base"]
    parts += [f"{words.short(fresh['value'] if fresh else None):>4} unlearned"] if claim.steps else []
    parts += [f"{words.share(claim.rate).split(' = ')[-1]} {words.after(claim) if claim.steps else 'unlearned'}"]
    return f"  {_name(claim.concept)}{_replicate(claim)}  {' -> '.join(parts)}: {claim.word}"


def _replicate(claim: Claim) -> str:
    """Which replicate it is, where it is not the first."""
    unlearn, finetune = (claim.seeds.get(role, 0) for role in ("unlearn", "finetune"))
    parts = [f"seed {unlearn}"] if unlearn else []
    parts += [f"fine-tune seed {finetune}"] if finetune not in (0, unlearn) else []
    return f" ({', '.join(parts)})" if parts else ""


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


def _side_by_side(claims: Sequence[Claim]) -> list[str]:
    """Where several were compared: one line per recipe, the worst concept of each column with the bounds of that worst."""
    rows = table.rows(claims)
    if len(rows) < 2:
        return []
    head = ("worst concept [bounds]", "base", "after unlearning", "retained", "after fine-tuning")
    cells = [head] + [
        (words.clean(row.method), *(_bounded(each) for each in (row.base, _rate(row.forgot_worst), _rate(row.retained), _rate(row.back_worst)))) for row in rows
    ]
    widths = [max(len(line[at]) for line in cells) for at in range(len(head))]
    return [*("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells), ""]


def _rate(worst: table.Extreme | None) -> Numbers | None:
    return worst.rate if worst else None


def _bounded(rate: Numbers | None) -> str:
    return words.share(rate).split(" = ")[-1] if rate else "-"


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
    said = (_name(claim.concept).strip(), words.clean(words.recipe(claim)), words.after(claim))
    what = ", ".join(part for part in said if part)
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


def markup(line: str, code: Exit) -> dict[str, bool]:
    """How the line that carries the verdict stands out; pytest drops it where there are no colours."""
    colour = {Exit.HOLDS: "green", Exit.BROKEN: "red"}.get(code, "yellow")
    return {colour: True, "bold": True} if line.startswith(f"{words.TITLES[code].upper()} (exit code") else {}
