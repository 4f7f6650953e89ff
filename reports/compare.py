"""What changed between two runs: claim by claim, paired by what was asked, and image by image where both drew the same ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.spec import HOLDS, Claim
from harness.stats import Interval, Paired, Rate, difference, mcnemar
from reports import words
from reports.files import VERDICT
from reports.table import WORST_FIRST
from reports.verdict import SCHEMA_VERSION, claims_of

ALPHA = 0.05
ASKED = ("suite", "task", "claim", "method", "finetune", "attack", "steps", "concept")  # what makes two claims the same question
INSTRUMENTS = ("model", "detector", "tolerance", "direction")  # what must not differ, or two rates are not about the same thing


@dataclass(frozen=True)
class Pair:
    """One claim in both runs."""

    before: Claim
    after: Claim

    @property
    def change(self) -> int:
        """Below 0: the verdict got worse; above: better. What is broken is worse than what could not be measured."""
        return WORST_FIRST[self.after.verdict] - WORST_FIRST[self.before.verdict]

    @property
    def images(self) -> Paired | None:
        """Hits that appeared and vanished over the images that both runs drew of the same prompts and noise."""
        mine, other = self.before.hits, self.after.hits
        common = [pair for prompt in mine.keys() & other.keys() for pair in zip(mine[prompt], other[prompt], strict=False)]
        return mcnemar([int(a) for a, _ in common], [int(b) for _, b in common]) if common else None

    @property
    def rise(self) -> Interval | None:
        """Rate after minus rate before, with bounds that stay true although both runs stopped when they liked."""
        if self.before.rate is None or self.after.rate is None or "figure" in self.after.rate:
            return None
        before, after = (Rate.of(r["k"], r["n"], ALPHA) for r in (self.before.rate, self.after.rate))
        return difference(before, after, ALPHA)

    @property
    def unlike(self) -> list[str]:
        """The instruments that differ."""
        return [name for name in INSTRUMENTS if getattr(self.before, name) != getattr(self.after, name)]


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side: common claims, those of one run only, and what differs in how they were made."""

    pairs: tuple[Pair, ...]
    gone: tuple[Claim, ...]
    new: tuple[Claim, ...]
    setting: tuple[str, ...]

    @property
    def worse(self) -> bool:
        """Whether something that held no longer does, got a worse verdict, or is not looked at any more."""
        return any(pair.change < 0 for pair in self.pairs) or any(claim.verdict == HOLDS for claim in self.gone)


def read(path: Path) -> dict[str, Any]:
    """The document of a report folder or of a verdict.json."""
    file = path / VERDICT if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        version = document["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"'{file}' is no verdict.json: {error!r}; give a report folder or the file itself") from error
    if version != SCHEMA_VERSION:
        raise StoreError(f"'{file}' has schema version {version!r}, this program reads {SCHEMA_VERSION}; compare with the version that wrote it")
    return dict(document)


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Pair the claims of two documents."""
    before, after = (_asked(claims_of(document)) for document in (a, b))
    return Comparison(
        pairs=tuple(Pair(before[key], after[key]) for key in before if key in after),
        gone=tuple(claim for key, claim in before.items() if key not in after),
        new=tuple(claim for key, claim in after.items() if key not in before),
        setting=tuple(_differences(_setting(a), _setting(b))),
    )


def lines(found: Comparison) -> Iterator[str]:
    """The comparison in words, most important first."""
    worse, better = ([p for p in found.pairs if p.change * sign > 0] for sign in (-1, 1))
    same = len(found.pairs) - len(worse) - len(better)
    for title, pairs in (("got worse", worse), ("got better", better)):
        yield from ([f"{title}:", *(_pair(p) for p in sorted(pairs, key=lambda p: p.change, reverse=title == "got better"))] if pairs else [])
    moved = [p for p in found.pairs if not p.change and p.rise and not p.rise.low <= 0 <= p.rise.high]
    yield from (["same verdict, but the rate moved:", *(_pair(p) for p in moved)] if moved else [])
    for title, claims in (("only in the first run", found.gone), ("only in the second run", found.new)):
        yield from ([f"{title}:", *(f"  {c.word}: {_what(c)}" for c in claims)] if claims else [])
    yield from (["made differently:", *(f"  {line}" for line in found.setting)] if found.setting else [])
    yield f"{len(found.pairs)} claims in both: {len(worse)} worse, {len(better)} better, {same} with the same verdict"


def _asked(claims: Sequence[Claim]) -> dict[tuple[Any, ...], Claim]:
    return {(*(getattr(c, name) for name in ASKED), tuple(sorted(c.seeds.items()))): c for c in claims}


def _what(claim: Claim) -> str:
    parts = (claim.claim, claim.concept, words.recipe(claim), words.after(claim))
    return words.clean(", ".join(part for part in parts if part))


def _pair(pair: Pair) -> str:
    rates = " -> ".join(words.share(claim.rate) for claim in (pair.before, pair.after))
    parts = [f"  {pair.before.word} -> {pair.after.word}: {_what(pair.after)}: {rates}"]
    if rise := pair.rise:
        parts.append(f"difference {rise.value:+.2f} [{rise.low:+.2f}, {rise.high:+.2f}]")
    if images := pair.images:
        parts.append(f"of {images.n} images of the same prompt and noise {images.returned} came back and {images.vanished} vanished")
    if pair.unlike:
        parts.append(f"NOT COMPARABLE: another {', '.join(pair.unlike)}")
    return "; ".join(parts)


def _setting(document: Mapping[str, Any]) -> dict[str, str]:
    """What a run was made with, flat."""
    run = document["run"]
    flat = {f"{part}.{name}": str(value) for part in ("options", "versions") for name, value in run.get(part, {}).items()}
    flat |= {name: str(run.get(name, "")) for name in ("machine", "devices")} | {"gate": str(document["gate"])}
    return flat | {f"candidate.{name}": digest for name, digest in document.get("subjects", {}).items()}


def _differences(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name) and name not in ("options.report", "options.store"):
            yield words.clean(f"{name}: {a.get(name, 'nothing')} -> {b.get(name, 'nothing')}")
