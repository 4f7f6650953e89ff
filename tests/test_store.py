"""The store: artefacts are whole or absent, whoever is killed and whoever else is writing."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import store as module
from harness.errors import StoreError
from harness.store import RECORD, Store
from tests.conftest import PATIENCE, PROCESSES, die, eventually

WRITERS = 3
FILES = ("a.bin", "b.bin")


def writer(word: bytes, times: int = 1) -> Callable[[Path], dict[str, Any]]:
    """Fills a folder with files that say who wrote them."""

    def write(folder: Path) -> dict[str, Any]:
        for name in FILES:
            (folder / name).write_bytes(word * times)
        return {"writer": word.decode()}

    return write


def words(folder: Path) -> set[str]:
    """Who wrote an artefact's files and its record."""
    return {Store(folder.parents[1]).read(folder)["writer"], *((folder / name).read_text() for name in FILES)}


def published(tmp_path: Path) -> tuple[Store, Path]:
    """A store with one artefact."""
    store = Store(tmp_path / "store")
    folder = store.folder("kind", "address")
    store.publish(folder, writer(b"one"))
    return store, folder


# --- one process -----------------------------------------------------------------------------------------------------


def test_what_was_published_is_read(tmp_path):
    """A record and its files come back; nothing else lies about."""
    store, folder = published(tmp_path)
    assert folder == tmp_path / "store" / "kind" / "address"
    assert store.has(folder)
    assert store.read(folder) == {"writer": "one"}
    assert sorted(path.name for path in folder.iterdir()) == ["a.bin", "b.bin", RECORD]
    assert list(folder.parent.iterdir()) == [folder]


def test_the_first_writer_wins(tmp_path):
    """Publishing again is not an error and changes nothing."""
    store, folder = published(tmp_path)
    store.publish(folder, writer(b"two"))
    assert words(folder) == {"one"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    """The writer's own error comes out, no half-written folder stays, and the next writer succeeds."""
    store = Store(tmp_path)
    folder = store.folder("kind", "address")

    def write(draft: Path) -> dict[str, Any]:
        (draft / "a.bin").write_bytes(b"x")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        store.publish(folder, write)
    assert list(folder.parent.iterdir()) == []
    store.publish(folder, writer(b"two"))
    assert words(folder) == {"two"}


def truncate(path: Path) -> None:
    """Lose the last byte."""
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_noticed(tmp_path, name, damage):
    """A truncated, changed or missing file is an error that names it and says what to do."""
    store, folder = published(tmp_path)
    damage(folder / name)
    with pytest.raises(StoreError, match=f"(?s){name}.*delete the folder and run again"):
        store.read(folder)


RECORDS = ["", "{", "[]", "null", "7", "{}", '{"record": {}}', '{"files": {}}', '{"record": {}, "files": []}', '{"record": 1, "files": {}}', "\udcff"]


@pytest.mark.parametrize("text", RECORDS)
def test_a_damaged_record_is_noticed(tmp_path, text):
    """A record that `publish` would not have written is an error that says what to do."""
    store, folder = published(tmp_path)
    (folder / RECORD).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StoreError, match="delete the folder and run again"):
        store.read(folder)


def test_no_flipped_bit_of_the_files_list_is_missed(tmp_path):
    """Whichever byte of the record's list of digests changes, reading fails."""
    store, folder = published(tmp_path)
    whole = (folder / RECORD).read_bytes()
    start = whole.index(b'"files"')
    for at in range(start, whole.index(b"}", start)):
        if not whole[at : at + 1].isspace():
            (folder / RECORD).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(StoreError, match="delete the folder and run again"):
                store.read(folder)


def test_what_is_not_there_cannot_be_read(tmp_path):
    """Reading an absent artefact is a StoreError, and `has` says so first."""
    store = Store(tmp_path)
    assert not store.has(store.folder("kind", "address"))
    with pytest.raises(StoreError, match="cannot be read"):
        store.read(store.folder("kind", "address"))


def test_what_is_there_is_listed_by_kind_and_start(tmp_path):
    """Locks are no kind of artefact, and an address is asked for by how it starts."""
    store, _ = published(tmp_path)
    store.publish(store.folder("kind", "other"), writer(b"two"))
    with store.lease("address"):
        assert store.kinds() == ["kind"]
    assert store.addresses("kind") == ["address", "other"]
    assert store.addresses("kind", "add") == ["address"]


def test_all_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Every file and the record are flushed before the rename, the folder that holds the name after it: losing power leaves no half artefact."""
    store, flushed = Store(tmp_path), []
    folder = store.folder("kind", "address")
    monkeypatch.setattr(module.os, "fsync", lambda descriptor: flushed.append((os.fstat(descriptor).st_ino, folder.exists())))
    store.publish(folder, writer(b"one"))
    inside = {(path.stat().st_ino, False) for path in folder.iterdir()}
    assert len(inside) == len(FILES) + 1
    assert set(flushed) == inside | {(folder.parent.stat().st_ino, True)}


# --- places that cannot be written -----------------------------------------------------------------------------------


def test_a_store_that_cannot_be_made(tmp_path):
    """A file where the store should be: the error names the option."""
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="choose another folder with --store"):
            Store(root)


def test_a_folder_that_cannot_be_made(tmp_path):
    """A file where the kind's folder should be."""
    (tmp_path / "kind").touch()
    with pytest.raises(StoreError, match="is the disk full or read-only"):
        Store(tmp_path).publish(tmp_path / "kind" / "address", writer(b"one"))


def test_a_lock_that_cannot_be_taken(tmp_path):
    """A file where the locks should be, or a folder where the lock should be."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "locks").touch()
    (tmp_path / "two" / "locks" / "address.lock").mkdir(parents=True)
    for root in ("one", "two"):
        with pytest.raises(StoreError, match="is the store read-only"), Store(tmp_path / root).lease("address"):
            pass


@pytest.mark.parametrize("call", ["mkdir", "write_text", "rename"])
def test_a_full_or_read_only_disk(tmp_path, monkeypatch, call):
    """Whichever step the system refuses, the error says so and nothing stays behind."""
    store = Store(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, refuse)
        with pytest.raises(StoreError, match="Read-only file system; is the disk full or read-only"):
            store.publish(store.folder("kind", "address"), writer(b"one"))
    assert not store.has(store.folder("kind", "address"))
    assert list(tmp_path.glob("kind/*")) == []


def test_a_disk_that_fills_up_while_writing(tmp_path):
    """An OSError of the writer itself is reported in the same words."""

    def write(draft: Path) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left on device; is the disk full"):
        Store(tmp_path).publish(tmp_path / "kind" / "address", write)


# --- two processes ---------------------------------------------------------------------------------------------------


def race(root: Path, start: Any, word: bytes, keys: int) -> int:
    """Publish key after key, each at the same moment as the others."""
    store = Store(root)
    for i in range(keys):
        start.wait(PATIENCE)
        store.publish(store.folder("kind", str(i)), writer(word))
    return keys


def test_a_race_leaves_one_whole_artefact(tmp_path, child):
    """Processes that publish one key at the same moment: none fails, one is kept, and only one's files are in it."""
    keys, start = 20, PROCESSES.Barrier(WRITERS)
    for each in [child(race, tmp_path, start, word, keys) for word in (b"one", b"two", b"six")[:WRITERS]]:
        assert each.result() == keys
    folders = sorted((tmp_path / "kind").iterdir())
    assert {folder.name for folder in folders} == {str(i) for i in range(keys)}
    assert all(len(words(folder)) == 1 for folder in folders)


def killed_at(root: Path, line: int) -> int:
    """Publish, and die before the given line of `publish` is executed. Returns how many lines there were."""
    seen = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            if seen == line:
                die()
            seen += 1
        return trace

    store = Store(root)
    sys.settrace(trace)
    store.publish(store.folder("kind", "address"), writer(b"one"))
    sys.settrace(None)
    return seen


def test_a_kill_at_any_line_leaves_a_whole_artefact_or_none(tmp_path, child):
    """SIGKILL before each line that `publish` executes: afterwards the artefact is whole or absent, and the next run publishes."""
    lines, kept = child(killed_at, tmp_path / "all", -1).result(), []
    assert lines >= 20
    children = {line: child(killed_at, tmp_path / str(line), line) for line in range(lines)}
    for line, each in children.items():
        assert each.wait() == -9
        store = Store(tmp_path / str(line))
        folder = store.folder("kind", "address")
        kept.append(folder.exists())
        if kept[-1]:
            assert words(folder) == {"one"}
        store.publish(folder, writer(b"two"))
        assert words(folder) == {"one" if kept[-1] else "two"}
    assert kept == sorted(kept)
    assert 0 < sum(kept) < len(kept)


def publishing(root: Path, word: bytes) -> None:
    """Publish one artefact after the other, forever."""
    store = Store(root)
    for i in range(10**9):
        store.publish(store.folder("kind", f"{word.decode()}{i}"), writer(word, 20_000))


def test_a_kill_at_a_random_moment_leaves_whole_artefacts(tmp_path, child):
    """SIGKILL of a process that publishes all the time, 20 times: every artefact under its name is whole."""
    rng, interrupted = random.Random(0), 0
    for i in range(20):
        word = f"-{i:02d}-".encode()
        each = child(publishing, tmp_path, word)
        assert eventually(lambda word=word: any(tmp_path.glob(f"kind/{word.decode()}0")))
        time.sleep(rng.random() / 50)
        assert each.kill() == -9
        interrupted += len(list(tmp_path.glob(f"kind/.{word.decode()}*")))
    whole = [folder for folder in (tmp_path / "kind").iterdir() if not folder.name.startswith(".")]
    assert interrupted >= 1
    assert len(whole) >= 1
    for folder in whole:
        assert Store(tmp_path).read(folder)["writer"] in folder.name


# --- leases ----------------------------------------------------------------------------------------------------------


def hold(root: Path, name: str, ready: Any, release: Any) -> str:
    """Take a lease and keep it until told."""
    with Store(root).lease(name) as mine:
        ready.set()
        release.wait(PATIENCE)
    return "released" if mine else "refused"


def ask(root: Path, name: str, wait: bool) -> bool:
    """Whether the lease is granted; it is given back at once."""
    with Store(root).lease(name, wait) as mine:
        return mine


def test_a_lease_that_another_process_holds(tmp_path, child):
    """Who does not wait is told False; who waits gets it once it is free; another name is free all the time."""
    ready, release = PROCESSES.Event(), PROCESSES.Event()
    holder = child(hold, tmp_path, "a", ready, release)
    assert ready.wait(PATIENCE)
    assert ask(tmp_path, "a", wait=False) is False
    assert ask(tmp_path, "b", wait=False) is True
    waiting = child(ask, tmp_path, "a", True)
    assert not waiting.receiver.poll(0.3)
    release.set()
    assert holder.result() == "released"
    assert waiting.result() is True
    assert ask(tmp_path, "a", wait=False) is True


def test_a_killed_holder_releases_its_lease(tmp_path, child):
    """The system takes a lock from a process that dies, so nobody waits forever."""
    ready, release = PROCESSES.Event(), PROCESSES.Event()
    holder = child(hold, tmp_path, "a", ready, release)
    assert ready.wait(PATIENCE)
    waiting = child(ask, tmp_path, "a", True)
    assert not waiting.receiver.poll(0.3)
    assert holder.kill() == -9
    assert waiting.result() is True
    assert ask(tmp_path, "a", wait=False) is True


def test_a_lease_can_be_taken_twice_by_its_holder(tmp_path, child):
    """The inner lease of one process is granted at once, and its end does not give up the outer one."""
    with Store(tmp_path).lease("a") as outer:
        with Store(tmp_path).lease("a", wait=False) as inner:
            assert (outer, inner) == (True, True)
        assert child(ask, tmp_path, "a", False).result() is False
    assert child(ask, tmp_path, "a", False).result() is True


def test_an_error_under_a_lease_releases_it(tmp_path, child):
    """The lease ends with its block, however the block ends."""
    with pytest.raises(KeyError), Store(tmp_path).lease("a"):
        raise KeyError
    assert child(ask, tmp_path, "a", False).result() is True


def test_a_record_is_readable_json(tmp_path):
    """The record lists every file with its SHA-256, so that other tools can check it too."""
    _, folder = published(tmp_path)
    whole = json.loads((folder / RECORD).read_text())
    assert whole["files"] == dict.fromkeys(FILES, "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed")
