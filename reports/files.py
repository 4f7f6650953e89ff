"""The files that a run leaves behind: each whole or absent, and none of an earlier run."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from reports import card, statement
from reports.verdict import Report, picture

VERDICT, PAGE, CARD, STATEMENT = "verdict.json", "report.html", "model-card.md", "statement.json"
OURS = re.compile(r"[0-9a-f]{16}\.png")  # names that `Report.pictures` gives


def clear(folder: Path) -> None:
    """Take away what an earlier run said, so that after a failure there is nothing instead of a stale green verdict."""
    for name in (VERDICT, STATEMENT, CARD, PAGE):
        (folder / name).unlink(missing_ok=True)


def write(report: Report, folder: Path) -> None:
    """Leave the page, its images, the evidence and verdict.json in `folder`; verdict.json comes last and only if all went well."""
    from reports import html  # jinja2 is loaded only where a page is written

    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    verdict = json.dumps(report.as_json(), indent=1, allow_nan=False).encode()
    pictures = report.pictures()
    page = html.page(report, pictures)
    for source, name in pictures.items():
        _publish(folder / name, picture(source))
    _prune(folder / "images", {Path(name).name for name in pictures.values()})
    _publish(folder / PAGE, page.encode("utf-8", "backslashreplace"))  # a lone surrogate is not UTF-8
    _publish(folder / CARD, card.block(report).encode("utf-8", "backslashreplace"))
    if report.subjects:
        made = statement.of(report, hashlib.sha256(verdict).hexdigest())
        _publish(folder / STATEMENT, json.dumps(made, indent=1).encode())
    _publish(folder / VERDICT, verdict)


def _prune(images: Path, kept: set[str]) -> None:
    """Remove the pictures that earlier reports left and this one does not show; other people's files stay."""
    for path in images.glob("*.png"):
        if OURS.fullmatch(path.name) and path.name not in kept:
            path.unlink()


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
