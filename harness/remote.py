"""A store behind a URL: an object store (S3, GCS, a Hugging Face bucket, whatever fsspec opens) with a local folder in front.

    <url>/<kind>/<address>/record.json                     written last: from then on the artefact is there
    <url>/<kind>/<address>/<digest, 16 digits>.<file>      two writers' files never mix: other bytes have another name
    <url>/locks/<name>.json                                who makes it, and until when that is believed

What is missing here is pulled when it is read, and its digests are checked before it gets its name; what is made here is
pushed before it gets its local name, so the local folder never holds what the bucket lacks. The record is created only if
it is absent: atomic where the filesystem can (S3 by If-None-Match, GCS by generation), elsewhere looked for and then
written, so that of two writers within one such moment the later one's stays. Both are whole: their files do not mix.

A lease is a local lock and a mark in the bucket that expires after `EXPIRY` seconds and is renewed while it is held. Clocks that
differ by minutes, or two processes that drop the same expired mark at once, cost double work and nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from harness.errors import StoreError
from harness.spec import key, sha256
from harness.store import LOCKS, RECORD, Store, parse

EXPIRY, POLL = 300.0, 2.0  # seconds
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol -> extra to install


class Remote(Store):
    """Artefacts in an object store; the folder `root` holds those that were made or read here."""

    poll: ClassVar[float] = 5.0

    def __init__(self, url: str, cache: Path | None = None) -> None:
        self.url = url.rstrip("/")
        self._fs, self._prefix = _opened(self.url)
        self._me = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex}"
        self._held: set[str] = set()
        super().__init__(cache or _cache(self.url))
        self._home = f"{platform.node()}:{self.root}"

    def has(self, folder: Path) -> bool:
        """Whether an artefact is there, here or in the bucket."""
        if super().has(folder):
            return True
        with self._reaching():
            return bool(self._fs.exists(f"{self._there(folder)}/{RECORD}"))

    def kinds(self) -> list[str]:
        """The kinds of artefacts that there are, here or in the bucket."""
        with self._reaching():
            found = {path.split("/")[-3] for path in self._fs.glob(f"{self._prefix}/*/*/{RECORD}")}
        return sorted(found | set(super().kinds()))

    def addresses(self, kind: str, prefix: str = "") -> list[str]:
        """The addresses of a kind's artefacts that start so."""
        with self._reaching():
            found = self._fs.glob(f"{self._prefix}/{kind}/{prefix}*/{RECORD}")
        return sorted({*super().addresses(kind, prefix), *(path.split("/")[-2] for path in found)})

    def read(self, folder: Path) -> dict[str, Any]:
        """The record of an artefact, after every file in it matched its digest; it is pulled if it is not here."""
        if not super().has(folder):
            self._pull(folder)
        return super().read(folder)

    def _text(self, folder: Path) -> str:
        if super().has(folder):
            return super()._text(folder)
        with self._reaching():
            return str(self._fs.cat_file(f"{self._there(folder)}/{RECORD}").decode())

    def _pull(self, folder: Path) -> None:
        there, draft = self._there(folder), self._draft(folder)
        text = self._text(folder)
        try:
            _, files = parse(text)
            draft.mkdir(parents=True)
            with self._reaching():
                for name, digest in files.items():
                    self._fs.get_file(f"{there}/{_named(name, digest)}", str(draft / name))
            if damaged := [name for name, digest in files.items() if sha256(draft / name) != digest]:
                raise ValueError(f"{', '.join(damaged)} changed since it was written")
            (draft / RECORD).write_text(text, encoding="utf-8")
            super()._commit(draft, folder)
        except ValueError as error:
            raise StoreError(f"artefact '{there}' of {self.url} is damaged: {error}; delete it there and run again") from error
        except OSError as error:
            if not super().has(folder):  # another process here was first
                raise StoreError(f"cannot write '{folder}': {error}; is the disk full or read-only?") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _commit(self, draft: Path, folder: Path) -> None:
        """Push a finished draft, its record last, then give it its name; if another's record is there, theirs counts."""
        there, text = self._there(folder), (draft / RECORD).read_text(encoding="utf-8")
        with self._reaching():
            for name, digest in parse(text)[1].items():
                self._fs.put_file(str(draft / name), f"{there}/{_named(name, digest)}")
            if not self._create(f"{there}/{RECORD}", text):
                return
        super()._commit(draft, folder)

    def _create(self, path: str, text: str) -> bool:
        """Write what is not there yet; whether it is ours that stands there, so a request that is sent twice does no harm."""
        try:
            self._fs.pipe_file(path, text.encode(), mode="create")
        except FileExistsError:
            pass  # whose it is, is looked at below
        except OSError:  # S3 says `conflict` while another's is being written
            if not self._fs.exists(path):
                raise
        return bool(self._fs.cat_file(path) == text.encode())

    def _there(self, folder: Path) -> str:
        return f"{self._prefix}/{folder.relative_to(self.root).as_posix()}"

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Whatever a filesystem raises, in words. Each has errors of its own."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(f"{self.url} does not answer as a store: {type(error).__name__}: {error}; check the address, access and network") from error

    # --- leases --------------------------------------------------------------------------------------------------

    @contextmanager
    def lease(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the right to make `name` among all who use the bucket; yields False where another holds it and `wait` is off."""
        with super().lease(name, wait) as mine:
            if not mine or name in self._held:  # a lease can be taken twice by its holder
                yield mine
                return
            while not (claimed := self._claim(name)) and wait:
                time.sleep(POLL)
            if not claimed:
                yield False
                return
            with self._renewed(name):
                yield True

    def _claim(self, name: str) -> bool:
        """Leave our mark, unless there is one that has not expired."""
        path = f"{self._prefix}/{LOCKS}/{name}.json"
        with self._reaching():
            for _ in range(2):
                if self._create(path, self._mark()):
                    return True
                with suppress(FileNotFoundError):  # it was given up just now
                    mark = json.loads(self._fs.cat_file(path))
                    dead = mark.get("home") == self._home  # we hold the local lock, so its process does not live any more
                    if mark["until"] > time.time() and not dead:
                        return False
                    self._fs.rm_file(path)
        return False

    def _mark(self) -> str:
        return json.dumps({"owner": self._me, "home": self._home, "until": time.time() + EXPIRY})

    @contextmanager
    def _renewed(self, name: str) -> Iterator[None]:
        """Keep our mark fresh, and take it away at the end."""
        path, done = f"{self._prefix}/{LOCKS}/{name}.json", threading.Event()

        def renew() -> None:
            while not done.wait(EXPIRY / 3):
                with suppress(Exception):  # a lost lease costs time only
                    self._fs.pipe_file(path, self._mark().encode())

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        self._held.add(name)
        try:
            yield
        finally:
            self._held.discard(name)
            done.set()
            thread.join()
            with suppress(Exception):  # it expires by itself
                if json.loads(self._fs.cat_file(path))["owner"] == self._me:
                    self._fs.rm_file(path)


def _named(name: str, digest: str) -> str:
    """A file's name in the bucket."""
    return f"{digest[:16]}.{name}"


def _opened(url: str) -> tuple[Any, str]:
    """The filesystem behind a URL, and the path on it."""
    import fsspec  # only where a URL is given

    try:
        filesystem, prefix = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        extra = EXTRAS.get(url.partition("://")[0])
        hint = f"install it with pip install 'resurgence[{extra}]'" if extra else "give a folder, or a URL of s3, gs or hf"
        raise StoreError(f"cannot open the store '{url}': {error}; {hint}") from error
    return filesystem, prefix.rstrip("/")


def _cache(url: str) -> Path:
    """The local folder of a URL's artefacts."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "resurgence" / key(url)[:12]
