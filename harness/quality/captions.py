"""Captions from a file that the user brings, such as COCO's."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from harness.errors import SpecError
from harness.spec import ImageSet, seed_of

COLUMNS = ("prompt", "caption", "text")
CHUNK = 1000  # captions of one set of images: what a killed run loses at most


def read(file: Path, count: int | None = None) -> tuple[str, ...]:
    """The first `count` captions: lines of a .txt, a column of a .csv, or one per image of a COCO annotation .json (the image's first)."""
    try:
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read captions from '{file}': {error}") from error
    suffix = file.suffix.lower()
    found = _csv(text, file) if suffix == ".csv" else _coco(text, file) if suffix == ".json" else text.splitlines()
    captions = tuple(line.strip() for line in found if line.strip())
    if len(captions) < max(2, count or 0):
        raise SpecError(f"'{file}' holds {len(captions)} captions, {max(2, count or 0)} are needed")
    return captions[:count]


def _csv(text: str, file: Path) -> list[str]:
    rows = list(csv.DictReader(text.splitlines()))
    column = next((name for name in COLUMNS if rows and name in rows[0]), None)
    if column is None:
        raise SpecError(f"'{file}' has no column named {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}")
    return [row[column] or "" for row in rows]


def _coco(text: str, file: Path) -> list[str]:
    try:
        first: dict[int, str] = {}
        for note in json.loads(text)["annotations"]:
            first.setdefault(note["image_id"], note["caption"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise SpecError(f"'{file}' is not a COCO caption file: it needs annotations with image_id and caption ({error!r})") from error
    return list(first.values())


def images(captions: tuple[str, ...], role: str = "quality", chunk: int = CHUNK) -> list[ImageSet]:
    """One image per caption, in sets of `chunk`; the noise depends on the caption, its place among all and the role, never on the model."""
    seeds = tuple(seed_of(role, i, caption) for i, caption in enumerate(captions))
    return [ImageSet(captions[at : at + chunk], seeds[at : at + chunk]) for at in range(0, len(captions), chunk)]
