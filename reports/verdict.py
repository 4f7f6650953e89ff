"""What a run amounts to: its claims, its exit code, and the document that a machine reads."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from harness.errors import StoreError
from harness.spec import BROKEN, HOLDS, INCONCLUSIVE, INVALID, Claim

SCHEMA_VERSION = 1  # a field that is added keeps it; one that is removed or means something else raises it


class Exit(IntEnum):
    """Exit codes. 2 to 5 belong to pytest; everything but 0 keeps a gate shut."""

    HOLDS = 0
    BROKEN = 1
    INCONCLUSIVE = 10
    INVALID = 11
    NOT_A_GATE = 12


class Run(TypedDict, total=False):
    """What was asked (the whole task), with what, for how long. Seconds are wall time; `unet_passes` and `images` are what was not in the store."""

    started: str
    options: dict[str, Any]
    tasks: dict[str, Any]
    versions: dict[str, str]
    machine: str
    devices: list[str]
    workers: int
    wall_seconds: float
    unet_passes: int
    images: int
    cache_hits: int


class Made(TypedDict):
    """How a model came to be: its base's digest, each stage's whole configuration, and the seconds each took when it was made."""

    base: str
    stages: list[dict[str, Any]]
    seconds: list[float]


class Document(TypedDict):
    """`verdict.json`."""

    schema_version: Literal[1]
    gate: bool
    exit_code: Literal[0, 1, 10, 11, 12]
    scope: str
    notices: list[str]
    deviations: list[str]
    missing: list[str]
    tests_failed: int
    subjects: dict[str, str]
    run: Run
    lineages: dict[str, Made]
    claims: list[Claim]


@dataclass(frozen=True)
class Report:
    """Everything a run has to say. `missing` and `deviations` exist so that silence never reads as success."""

    claims: tuple[Claim, ...]
    missing: tuple[str, ...] = ()  # selected, but no verdict came: a crashed worker, a skipped test
    deviations: tuple[str, ...] = ()  # why this selection is not a gate; empty: it is one
    scope: str = ""
    notices: tuple[str, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)
    tests_failed: int = 0  # tests that failed or errored without a claim
    subjects: Mapping[str, str] = field(default_factory=dict)  # the candidate's files -> their SHA-256
    lineages: Mapping[str, Any] = field(default_factory=dict)  # a claim's `lineage` -> how it was made

    @property
    def gate(self) -> bool:
        """Whether this selection, if everything holds, may open a gate."""
        return not self.deviations

    @property
    def counts(self) -> Mapping[str, int]:
        """How many claims got each verdict."""
        return Counter(claim.verdict for claim in self.claims)

    @property
    def complete(self) -> bool:
        """Whether every selected claim was validly measured."""
        return bool(self.claims) and not (self.missing or self.tests_failed or self.counts[INVALID])

    @property
    def exit_code(self) -> Exit:
        """A broken claim is said first; then missing evidence; then doubt; then a selection that is no gate."""
        if self.counts[BROKEN]:
            return Exit.BROKEN
        if not self.complete:
            return Exit.INVALID
        if self.counts[INCONCLUSIVE]:
            return Exit.INCONCLUSIVE
        if not self.gate:
            return Exit.NOT_A_GATE
        return Exit.HOLDS if self.counts[HOLDS] == len(self.claims) else Exit.INVALID

    def pictures(self) -> dict[str, str]:
        """Where each linked image goes, relative to the report: named by its content."""
        paths = {path for claim in self.claims for row in claim.images.values() for path in row}
        return {path: f"images/{hashlib.sha256(picture(path)).hexdigest()[:16]}.png" for path in sorted(paths)}

    def as_json(self) -> dict[str, Any]:
        """The whole report in plain JSON values: a `Document`."""
        pictures = self.pictures()
        return {
            "schema_version": SCHEMA_VERSION,
            "gate": self.gate,
            "exit_code": int(self.exit_code),
            "scope": self.scope,
            "notices": list(self.notices),
            "deviations": list(self.deviations),
            "missing": list(self.missing),
            "tests_failed": self.tests_failed,
            "subjects": plain(self.subjects),
            "run": plain(self.run),
            "lineages": plain(self.lineages),
            "claims": [_claim(claim, pictures) for claim in self.claims],
        }


def claims_of(document: Mapping[str, Any]) -> tuple[Claim, ...]:
    """The claims of a `verdict.json`; fields of a newer version are left out."""
    known = {f.name for f in dataclasses.fields(Claim)}
    return tuple(Claim(**{name: value for name, value in each.items() if name in known}) for each in document["claims"])


def picture(path: str) -> bytes:
    """The bytes of an image that a claim links."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StoreError(f"image {path}, linked by a claim, cannot be read: {error}; run again to redraw it") from error


def plain(value: Any) -> Any:
    """`value` as JSON: what JSON does not know (a path, a version) becomes text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _claim(claim: Claim, pictures: Mapping[str, str]) -> dict[str, Any]:
    values = {f.name: plain(getattr(claim, f.name)) for f in dataclasses.fields(claim)}
    return values | {"images": {title: [pictures[path] for path in row] for title, row in claim.images.items()}}
