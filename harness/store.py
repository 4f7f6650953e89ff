"""Address to artefact: folders that are whole or absent, checked when read.

    <root>/<kind>/<address>/record.json + files        kinds: checkpoints, images, scores

An artefact is written into a temporary sibling, flushed, and renamed into place; the first writer wins. Locks only
avoid double work: losing one costs time, never correctness. They are released by the system when a process dies.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harness.errors import StoreError
from harness.spec import sha256

RECORD = "record.json"


class Store:
    """A folder of artefacts, safe to share between processes."""

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

    def publish(self, folder: Path, write: Callable[[Path], Mapping[str, Any]]) -> None:
        """Make an artefact: `write` fills an empty folder and returns its record. First writer wins."""
        draft = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
        try:
            draft.mkdir(parents=True)
            record = {"record": dict(write(draft)), "files": {p.name: sha256(p) for p in sorted(draft.iterdir())}}
            (draft / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
            for path in draft.iterdir():
                _flush(path)
            draft.rename(folder)  # refused by the system if another writer was first: theirs is as good
            _flush(folder.parent)
        except OSError as error:
            if not self.has(folder):
                raise StoreError(f"cannot write '{folder}': {error}; is the disk full or read-only?") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def read(self, folder: Path) -> dict[str, Any]:
        """The record of an artefact, after every file in it matched its digest."""
        try:
            whole = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            record = dict(whole["record"])
            damaged = [name for name, digest in whole["files"].items() if sha256(folder / name) != digest]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"artefact '{folder}' cannot be read: {error}; delete the folder and run again") from error
        if damaged:
            raise StoreError(f"artefact '{folder}' is damaged: {', '.join(damaged)} changed since it was written; delete the folder and run again")
        return record

    @contextmanager
    def lease(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the right to make `name`; yields False where another process holds it and `wait` is off."""
        path = self.root / "locks" / f"{name}.lock"
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


def _flush(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
