"""What a store holds, in words; whether all of it is sound; and what can go. No torch in here.

python -m harness store ls|verify|gc --store DIR
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harness.errors import SpecError, StoreError
from harness.spec import key
from harness.store import LOCKS, RECORD, Store, open_store

DRAFT = 3600.0  # seconds after which a draft that nobody wrote into is taken for a killed writer's


@dataclass(frozen=True)
class Artefact:
    """One artefact that lies in the store's folder."""

    folder: Path

    @property
    def place(self) -> str:
        """Kind and address."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @cached_property
    def bytes(self) -> int:
        """Its size on disk."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())

    @property
    def age(self) -> float:
        """Days since it was made or last read."""
        return (time.time() - (self.folder / RECORD).stat().st_mtime) / 86400


def artefacts(store: Store) -> list[Artefact]:
    """Everything in the store's folder, kind by kind; of a bucket, what was made or read here."""
    return [Artefact(store.folder(kind, address)) for kind in Store.kinds(store) for address in Store.addresses(store, kind)]


class Words:
    """What each artefact is, in a few words of its record."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._models: dict[str, str] = {}
        for address in Store.addresses(store, "checkpoints"):
            try:
                record = store.record(store.folder("checkpoints", address))
                self._models[record["key"]] = chain(record)
            except (StoreError, KeyError, TypeError, AttributeError):
                continue  # `of` says it

    def of(self, artefact: Artefact) -> str:
        """Lineage, images or detector."""
        try:
            return self._say(artefact.folder.parent.name, self._store.record(artefact.folder))
        except StoreError as error:
            return f"DAMAGED: {error}"
        except (KeyError, TypeError, AttributeError):
            return "(a record that says nothing about where it comes from)"

    def _say(self, kind: str, record: Mapping[str, Any]) -> str:
        if kind == "checkpoints":
            return chain(record)
        who = self._models.get(record.get("lineage", ""), "the base model, or one whose checkpoint is not here")
        if kind == "images":
            prompts = list(dict.fromkeys(record["prompts"]))
            rest = f" and {len(prompts) - 1} more prompts" if prompts[1:] else ""
            return f"{len(record['prompts'])} images of '{prompts[0]}'{rest}, drawn by {who}"
        if kind == "losses":
            return f"held-out loss of {who}"
        if "images" in record:
            return f"{record.get('detector', 'PNG files')} on images {record['images']}"
        return ", ".join(f"{name} {value}" for name, value in record.items() if isinstance(value, str | int))


def chain(record: Mapping[str, Any]) -> str:
    """A checkpoint's stages: `base 1a2b3c4d > esd 150 steps > lora-in 50 steps`."""
    return " > ".join([f"base {record['base'][:40]}", *(stage(each) for each in record["stages"])])


def stage(fields: Mapping[str, Any]) -> str:
    """One stage of a record."""
    name = fields["class"].split(".")[-2] + (f"-{fields['data']}" if fields.get("data") else "")
    base = f" around {stage(fields['base'])}" if isinstance(fields.get("base"), Mapping) else ""
    erased = fields.get("task", {}).get("erased")
    parts = [
        f"{fields['steps']} steps" if "steps" in fields else "",
        f"seed {fields['seed']}" if fields.get("seed") else "",
        f"of {', '.join(erased['concepts'][:2])}{' ...' if erased['concepts'][2:] else ''}" if erased else "",
    ]
    return " ".join([name + base, *(part for part in parts if part)])


def misplaced(kind: str, address: str, record: Mapping[str, Any]) -> str:
    """Why a record does not belong to its address; nothing if it does, or if it does not hold enough to tell."""
    if kind == "checkpoints":
        *front, last = record["stages"]
        base = {"digest": record["base"]}
        steps = int(last.get("steps", 0))
        expected = f"{key([base, front, {k: v for k, v in last.items() if k != 'steps'}])}-{steps}"
        if record["key"] != key([base, record["stages"]]):
            return "its record's key is not that of its stages"
    elif kind in ("images", "pictures"):  # the sampler, or the number, stands in the address alone
        return ""
    else:
        expected = key(record)
    return "" if address == expected else f"its record belongs to the address {expected}"


def damage(store: Store, artefact: Artefact) -> str:
    """What is wrong with an artefact; nothing if it is sound."""
    try:
        return misplaced(artefact.folder.parent.name, artefact.folder.name, store.read(artefact.folder))
    except StoreError as error:
        return str(error)
    except (KeyError, ValueError, TypeError, AttributeError, SpecError) as error:
        return f"its record does not say where it comes from: {type(error).__name__} {error}"


def leftovers(store: Store) -> Iterator[Path]:
    """Drafts of writers that were killed, and locks that nobody holds."""
    for draft in sorted(store.root.glob("*/.*")):
        with suppress(OSError):  # a living writer has just finished it
            if draft.is_dir() and time.time() - max(p.stat().st_mtime for p in (draft, *draft.rglob("*"))) > DRAFT:
                yield draft
    for path in sorted(store.root.glob(f"{LOCKS}/*.lock")):
        try:
            with FileLock(path, timeout=0):
                yield path  # whoever deletes it does so while it is ours
        except Timeout:
            continue


def unused(store: Store, days: float) -> list[Artefact]:
    """What nobody made or read for so many days."""
    return [each for each in artefacts(store) if each.age > days]


def remove(store: Store, artefact: Artefact) -> None:
    """Delete an artefact: it is gone at once, and its files then."""
    draft = artefact.folder.parent / f".{artefact.folder.name}.deleted"
    artefact.folder.rename(draft)
    shutil.rmtree(draft)


# --- the command line ------------------------------------------------------------------------------------------------


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("action", choices=["ls", "verify", "gc"], help="list, check every digest, or say what could be deleted")
    parser.add_argument("--store", default=".store", help="folder or URL (default .store); of a URL, ls and gc see its local folder, verify fetches all")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="gc: also artefacts that nobody made or read for so many days")
    parser.add_argument("--delete", action="store_true", help="gc: do it; without this nothing is deleted")


def main(given: argparse.Namespace) -> int:
    """List, verify or clean a store; the exit code is 1 if something is damaged."""
    if "://" not in given.store and not Path(given.store).is_dir():
        raise SpecError(f"no store at '{given.store}'; give the folder that --store named when it was filled")
    store = open_store(given.store)
    return {"ls": _ls, "verify": _verify, "gc": _gc}[given.action](store, given)


def _ls(store: Store, given: argparse.Namespace) -> int:
    words, found = Words(store), artefacts(store)
    for each in found:
        print(f"{each.place:<48} {megabytes(each.bytes):>10}  {words.of(each)}")
    print(f"{len(found)} artefacts, {megabytes(sum(each.bytes for each in found))}")
    return 0


def _verify(store: Store, given: argparse.Namespace) -> int:
    found = [Artefact(store.folder(kind, address)) for kind in store.kinds() for address in store.addresses(kind)]
    wrong = {each.place: said for each in found if (said := damage(store, each))}
    for place, said in wrong.items():
        print(f"{place}: {said}")
    print(f"{len(found)} artefacts, {len(wrong)} damaged")
    return 1 if wrong else 0


def _gc(store: Store, given: argparse.Namespace) -> int:
    total = count = 0
    for path in leftovers(store):
        size = sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())
        count, total = count + 1, total + size
        print(f"{'deleted' if given.delete else 'would delete'} {path.relative_to(store.root)}: left behind")
        if given.delete:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for each in unused(store, given.older_than) if given.older_than is not None else []:
        count, total = count + 1, total + each.bytes
        print(f"{'deleted' if given.delete else 'would delete'} {each.place}: not used for {each.age:.0f} days")
        if given.delete:
            remove(store, each)
    print(f"{count} things, {megabytes(total)}{'' if given.delete else '; nothing was deleted, add --delete'}")
    return 0


def megabytes(size: float) -> str:
    """A size for people, in powers of ten."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
