"""Address to artefact: folders that are whole or absent, checked when read.

    <root>/<kind>/<address>/record.json + files        kinds: checkpoints, images, scores, ...

An artefact is written into a temporary sibling (its draft), flushed, and renamed into place; the first writer wins.
Locks only avoid double work: losing one costs time, never correctness. They are released by the system when a
process dies. `harness.remote` puts an object store behind such a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout

from harness.errors import StoreError
from harness.spec import sha256

RECORD = "record.json"
LOCKS = "locks"


def open_store(place: Path | str) -> Store:
    """The store in a folder, or behind a URL such as s3://bucket/prefix."""
    if "://" not in (text := str(place).removeprefix("file://")):
        return Store(Path(text))
    from harness.remote import Remote  # here, because it builds upon this file

    return Remote(text)


class Store:
    """A folder of artefacts, safe to share between processes."""

    poll: ClassVar[float] = 0.2  # seconds between two looks for what another process makes

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make the store at '{root}': {error}; choose another folder with --store") from error

    def folder(self, kind: str, address: str) -> Path:
        """Where an artefact is or will be."""
        return self.root / kind / address

    def has(self, folder: Path) -> bool:
        """Whether an artefact is there (a folder appears whole or not at all)."""
        return (folder / RECORD).is_file()

    def kinds(self) -> list[str]:
        """The kinds of artefacts that there are."""
        return sorted(p.name for p in self.root.iterdir() if p.is_dir() and p.name != LOCKS)

    def addresses(self, kind: str, prefix: str = "") -> list[str]:
        """The addresses of a kind's artefacts that start so; a draft, whose name starts with a dot, is none."""
        return sorted(p.name for p in (self.root / kind).glob(f"{prefix}*") if not p.name.startswith(".") and self.has(p))

    def publish(self, folder: Path, write: Callable[[Path], Mapping[str, Any]]) -> None:
        """Make an artefact: `write` fills an empty folder and returns its record. First writer wins."""
        draft = self._draft(folder)
        try:
            draft.mkdir(parents=True)
            whole = {"record": dict(write(draft)), "files": {p.name: sha256(p) for p in sorted(draft.iterdir())}}
            (draft / RECORD).write_text(json.dumps({**whole, "digest": _seal(whole)}, indent=1, sort_keys=True), encoding="utf-8")
            for path in draft.iterdir():
                _flush(path)
            self._commit(draft, folder)
        except OSError as error:
            if not self.has(folder):
                raise StoreError(f"cannot write '{folder}': {error}; is the disk full or read-only?") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    @staticmethod
    def _draft(folder: Path) -> Path:
        return folder.parent / f".{folder.name}.{uuid.uuid4().hex}"

    def _commit(self, draft: Path, folder: Path) -> None:
        """Give a finished draft its name."""
        draft.rename(folder)  # refused by the system if another writer was first: theirs is as good
        _flush(folder.parent)

    def read(self, folder: Path) -> dict[str, Any]:
        """The record of an artefact, after every file in it matched its digest."""
        try:
            record, files = parse(self._text(folder))
            damaged = [name for name, digest in files.items() if sha256(folder / name) != digest]
        except (OSError, ValueError) as error:
            raise StoreError(f"artefact '{folder}' cannot be read: {error}; delete the folder and run again") from error
        if damaged:
            raise StoreError(f"artefact '{folder}' is damaged: {', '.join(damaged)} changed since it was written; delete the folder and run again")
        with suppress(OSError):  # when it was used last, for `gc`; a store that is only read cannot be told
            os.utime(folder / RECORD)
        return record

    def record(self, folder: Path) -> dict[str, Any]:
        """The record of an artefact, whose files stay unread."""
        try:
            return parse(self._text(folder))[0]
        except (OSError, ValueError) as error:
            raise StoreError(f"artefact '{folder}' cannot be read: {error}; delete the folder and run again") from error

    def _text(self, folder: Path) -> str:
        return (folder / RECORD).read_text(encoding="utf-8")

    @contextmanager
    def lease(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the right to make `name`; yields False where another process holds it and `wait` is off."""
        path = self.root / LOCKS / f"{name}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, is_singleton=True)  # one per process and path, so that it can be taken twice
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise StoreError(f"cannot lock '{path}': {error}; is the store read-only?") from error
        try:
            yield True
        finally:
            lock.release()


def parse(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A record file's record and its files' digests; ValueError where it is not what `publish` wrote.

    The seal covers both. Records from before there was one are taken as they are.
    """
    whole = json.loads(text)
    if not isinstance(whole, dict) or not {"record", "files"} <= whole.keys() <= {"record", "files", "digest"}:
        raise ValueError("its record is not one")
    seal = whole.pop("digest", None)
    if not all(isinstance(part, dict) for part in whole.values()):
        raise ValueError("its record is not one")
    if seal is not None and seal != _seal(whole):
        raise ValueError("its record changed since it was written")
    if strange := [name for name in whole["files"] if Path(name).name != name]:
        raise ValueError(f"its record names '{strange[0]}', which would lie outside of it")
    return whole["record"], whole["files"]


def _seal(whole: Mapping[str, Any]) -> str:
    """SHA-256 of a record and its list of files, as JSON gives them back."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(whole)), sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
