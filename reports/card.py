"""A block of Markdown for a model card: the verdict, a row per recipe, and what was not measured."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from reports import table, words
from reports.verdict import Report

BEGIN, END = "<!-- resurgence: begin -->", "<!-- resurgence: end -->"  # so that a tool can replace the block
HEAD = ("Model", "Concepts", "After unlearning, worst", "After fine-tuning, worst", "Retained, least", "Verdicts")
SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$@<>&-])")


def block(report: Report) -> str:
    """The block, ending with a newline."""
    lines = [BEGIN, f"## Resurgence: {words.TITLES[report.exit_code].lower()}", "", text(words.finding(report)), ""]
    if rows := table.rows(report.claims):
        lines += [_line(HEAD), _line("---" for _ in HEAD), *(_line(_cells(row)) for row in rows), ""]
    lines += [f"- Claims: {words.tally(report)}. Exit code {int(report.exit_code)}; {'a complete gate' if report.gate else 'not a gate'}."]
    lines += [f"- Not a gate: {text(reason)}." for reason in report.deviations]
    lines += [f"- Measured: {text(report.scope)}"] if report.scope else []
    lines += [f"- {text(notice)}" for notice in report.notices]
    lines += [f"- {text(name)}: SHA-256 `{digest}`" for name, digest in report.subjects.items()]
    return "\n".join([*lines, END, ""])


def text(raw: str) -> str:
    """`raw` on one line, so that nothing in it is markup."""
    return SPECIAL.sub(lambda found: html.escape(found[1]) if found[1] in "<>&" else f"\\{found[1]}", words.clean(raw))


def _cells(row: table.Row) -> list[str]:
    found = (row.forgot_worst, row.back_worst, row.retained)
    rates = [words.share(each.rate) if each else "not measured" for each in found]
    return [text(row.method), str(row.concepts), *rates, words.counted(row.counts)]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
