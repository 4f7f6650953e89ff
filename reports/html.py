"""One static page: what was found, the curve of every concept, its images, and where the numbers come from."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from harness.spec import Claim
from reports import curve, table, words
from reports.ranking import ranking
from reports.verdict import Report

OPEN = 3  # sections unfolded at first
LISTED = 8  # failing cells named at the top
SHOWN = 8  # images shown per row; the others are linked in verdict.json
BLOCK = 4  # images side by side in one block, so that rows stay aligned on a telephone

Row = tuple[str, tuple[str, ...]]  # title, pictures
Breakdown = tuple[tuple[str, ...], dict[str, list[str]]]  # when the images were drawn; prompt -> hits of images at each


@dataclass(frozen=True)
class Block:
    """Rows of images drawn for the same prompts, which stand below each other; `first` images of each row came in earlier blocks."""

    first: int
    asked: tuple[str, ...]  # the prompt of each column; none where the claims do not tell them
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Section:
    """One concept under one task."""

    concept: str
    task: str
    claims: tuple[Claim, ...]
    curve: curve.Curve | None
    grids: Mapping[str, list[Block]]
    prompts: Mapping[str, Breakdown]
    spoken: Mapping[str, Claim]  # recipe -> the claim that speaks for it
    veiled: bool

    @property
    def worst(self) -> Claim:
        """The claim that speaks for the section."""
        return min(self.claims, key=table.severity)

    @property
    def replicated(self) -> bool:
        """Whether some cell was measured with several seeds, which then have to be told apart."""
        return len({(c.claim, c.method, c.finetune, c.attack, c.steps) for c in self.claims}) < len(self.claims)


def page(report: Report, pictures: Mapping[str, str]) -> str:
    """The page as text; `pictures` says where each linked image lies relative to it."""
    found = sections(report.claims, pictures)
    first = {id(s) for s in sorted(found, key=lambda s: table.severity(s.worst))[:OPEN]}
    return _template().render(
        report=report,
        words=words,
        listed=LISTED,
        title=words.TITLES[report.exit_code],
        colour=words.TITLES[report.exit_code].split()[0].lower(),  # a CSS class: holds, broken, ..., not
        rows=table.rows(report.claims),
        ranking=ranking(report.claims),
        sections=found,
        unfolded=[id(s) in first for s in found],
        failing=table.failing(report.claims),
        place={claim.id: i for i, s in enumerate(found, 1) for claim in s.claims},
        detectors=sorted({c.detector for c in report.claims if c.detector}),
        run={key: _text(value) for key, value in report.run.items()},
    )


def sections(claims: Sequence[Claim], pictures: Mapping[str, str]) -> list[Section]:
    """The claims by concept, in the order in which they were measured."""
    groups: dict[tuple[str, str, str], list[Claim]] = {}
    for claim in claims:
        groups.setdefault((claim.suite, claim.task, claim.concept), []).append(claim)
    also = table.varying(claims)
    named = [(cells, table.recipes(cells, also)) for cells in groups.values()]
    names = dict.fromkeys([*table.recipes(claims, also), *(name for _, recipes in named for name in recipes)])
    styles = {name: curve.Style.of(place) for place, name in enumerate(names)}  # the same in every section
    return [_section(cells, recipes, styles, pictures) for cells, recipes in named]


def _section(
    cells: list[Claim],
    recipes: Mapping[str, list[Claim]],
    styles: Mapping[str, curve.Style],
    pictures: Mapping[str, str],
) -> Section:
    first = cells[0]
    methods = list(dict.fromkeys(c.method for c in cells))
    return Section(
        concept=first.concept,
        task=f"{first.suite} / {first.task}",
        claims=tuple(sorted(cells, key=lambda c: (methods.index(c.method), c.finetune or "", c.attack or "", c.steps))),
        curve=curve.of(cells, styles, recipes),
        grids={name: found for name, same in recipes.items() if (found := grid(same, pictures))},
        prompts={name: told for name, same in recipes.items() if (told := breakdown(same))[1]},
        spoken={name: min(same, key=table.severity) for name, same in recipes.items() if same},
        veiled=first.suite in words.VEILED,
    )


def grid(cells: Sequence[Claim], pictures: Mapping[str, str]) -> list[Block]:
    """The rows of images of one recipe, apart where their prompts differ, cut into blocks; a row that two claims share is shown once.

    Image i of a claim was drawn for prompt i of its hits, and from the first again where there are more images than prompts.
    """
    shared: dict[tuple[str, ...], dict[Row, None]] = {}
    for claim in sorted(cells, key=lambda c: c.steps):
        rows = ((title, tuple(pictures[path] for path in paths[:SHOWN])) for title, paths in claim.images.items())
        shared.setdefault(tuple(claim.hits), {}).update(dict.fromkeys(rows))
    return [block for prompts, found in shared.items() for block in _blocks(prompts, list(found))]


def _blocks(prompts: tuple[str, ...], rows: Sequence[Row]) -> Iterator[Block]:
    longest = max((len(row) for _, row in rows), default=0)
    asked = tuple(islice(cycle(prompts), longest))
    for i in range(0, longest, BLOCK):
        yield Block(i, asked[i : i + BLOCK], tuple((title, row[i : i + BLOCK]) for title, row in rows))


def breakdown(cells: Sequence[Claim]) -> Breakdown:
    """Hits of images by prompt, one column per moment; where replicates share a moment they are added up."""
    looked = sorted((c for c in cells if c.hits), key=lambda c: c.steps)
    moments = list(dict.fromkeys(words.after(c) for c in looked))
    counts: dict[str, Counter[tuple[str, str]]] = {}
    for claim in looked:
        for prompt, hits in claim.hits.items():
            counts.setdefault(prompt, Counter()).update({(words.after(claim), digit): hits.count(digit) for digit in "01"})
    shown = {prompt: [_share(seen[when, "1"], seen[when, "0"]) for when in moments] for prompt, seen in counts.items()}
    return tuple(moments), shown


def _share(hits: int, misses: int) -> str:
    return f"{hits}/{hits + misses}" if hits + misses else "-"


@cache
def _template() -> Template:
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"digest": _digest, "listing": _text}
    return environment.get_template("template.html")


def _digest(script: str) -> str:
    """What the page's own policy calls this script, so that the browser runs no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=1, default=str, ensure_ascii=False)
