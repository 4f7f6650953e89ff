"""What a run amounts to: its claims, its exit code, and the files it leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.spec import BROKEN, HOLDS, INCONCLUSIVE, INVALID, Claim

SCHEMA_VERSION = 1


class Exit(IntEnum):
    """Exit codes. 2 to 5 belong to pytest; everything but 0 keeps a gate shut."""

    HOLDS = 0
    BROKEN = 1
    INCONCLUSIVE = 10
    INVALID = 11
    NOT_A_GATE = 12


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
        return {path: f"images/{hashlib.sha256(_picture(path)).hexdigest()[:16]}.png" for path in sorted(paths)}

    def as_json(self) -> dict[str, Any]:
        """The whole report in plain JSON values."""
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
            "run": _plain(self.run),
            "claims": [_claim(claim, pictures) for claim in self.claims],
        }


def write(report: Report, folder: Path) -> None:
    """Leave report.html, its images and verdict.json in `folder`; verdict.json comes last and only if all went well.

    The verdict of an earlier run is removed first: after a failure there is none, instead of a stale green one.
    """
    from reports import html  # jinja2 is loaded only where a page is written

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("verdict.json", "report.html"):
        (folder / name).unlink(missing_ok=True)
    verdict = json.dumps(report.as_json(), indent=1, allow_nan=False)
    pictures = report.pictures()
    page = html.page(report, pictures)
    for source, name in pictures.items():
        _publish(folder / name, _picture(source))
    _publish(folder / "report.html", page.encode("utf-8", "backslashreplace"))  # a lone surrogate is not UTF-8
    _publish(folder / "verdict.json", verdict.encode())


def _publish(target: Path, data: bytes) -> None:
    """Write `data` so that a reader sees all of it or none of it; what is there already stays."""
    if target.is_file() and target.read_bytes() == data:
        return
    target.parent.mkdir(exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def _picture(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StoreError(f"image {path}, linked by a claim, cannot be read: {error}; run again to redraw it") from error


def _claim(claim: Claim, pictures: Mapping[str, str]) -> dict[str, Any]:
    values = {f.name: _plain(getattr(claim, f.name)) for f in dataclasses.fields(claim)}
    return values | {"images": {title: [pictures[path] for path in row] for title, row in claim.images.items()}}


def _plain(value: Any) -> Any:
    """`value` as JSON: what JSON does not know (a path, a version) becomes text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
