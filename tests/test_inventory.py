"""`python -m harness store`: what lies in a store, what is damaged in it, and what may go. No model is needed for that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harness import inventory
from harness.__main__ import main
from harness.errors import StoreError
from harness.spec import key
from harness.store import RECORD, Store

ERASED = {"concepts": ["Tildeth", "Juno", "Edric"], "prompts": ["a {}"]}
STAGES = [
    {"class": "harness.unlearning.esd.Method", "version": 1, "steps": 150, "seed": 0, "task": {"erased": ERASED}},
    {"class": "harness.finetuning.lora.Finetune", "version": 1, "data": "in", "steps": 50, "seed": 2, "task": {}},
]


def checkpoint(store: Store, stages: list[dict[str, Any]]) -> Path:
    """What the engine would publish for these stages, with 1000 bytes of weights."""
    base = {"digest": "b" * 32}
    *front, last = stages
    trajectory = key([base, front, {k: v for k, v in last.items() if k != "steps"}])
    folder = store.folder("checkpoints", f"{trajectory}-{last['steps']}")
    store.publish(folder, lambda draft: (draft / "weights").write_bytes(b"w" * 1000) and {"key": key([base, stages]), "base": base["digest"], "stages": stages})
    return folder


def kept(store: Store, kind: str, record: dict[str, Any], address: str = "") -> Path:
    """Any other artefact of one byte."""
    folder = store.folder(kind, address or key(record))
    store.publish(folder, lambda draft: (draft / "data").write_bytes(b"d") and record)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with two checkpoints, images of the second, and scores of those."""
    store = Store(tmp_path / "store")
    checkpoint(store, STAGES[:1])
    checkpoint(store, STAGES)
    record = {"lineage": key([{"digest": "b" * 32}, STAGES]), "prompts": ["a x", "a x", "the x"], "seeds": [1, 2, 3]}
    kept(store, "images", record, "images-1")
    kept(store, "scores", {"images": "images-1", "detector": "eyes"})
    return store


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Exit code and lines of the command."""
    code = main(["store", *arguments])
    return code, capsys.readouterr().out.splitlines()


def aged(path: Path, seconds: float) -> None:
    """Make a file or folder look as old."""
    for each in (*path.rglob("*"), path):
        os.utime(each, (time.time() - seconds,) * 2)


# --- listing ---------------------------------------------------------------------------------------------------------


def test_every_artefact_is_said_in_words(store, capsys):
    """Kind, address, size, and the lineage from the record."""
    code, lines = said(capsys, "ls", "--store", str(store.root))
    assert code == 0
    model = f"base {'b' * 32} > esd 150 steps of Tildeth, Juno ... > lora-in 50 steps seed 2"
    assert sum(line.endswith(model) and line.startswith("checkpoints/") for line in lines) == 1
    assert sum(line.endswith("> esd 150 steps of Tildeth, Juno ...") for line in lines) == 1
    assert any(f"3 images of 'a x' and 1 more prompts, drawn by {model}" in line for line in lines)
    assert any("eyes on images images-1" in line for line in lines)
    assert lines[-1].startswith("4 artefacts, 0.0 MB")


def test_a_size_is_what_the_folder_takes(store):
    """All its files, the record too."""
    folder = store.folder("checkpoints", store.addresses("checkpoints")[0])
    assert inventory.Artefact(folder).bytes == 1000 + len((folder / RECORD).read_bytes())


def test_meta_unlearning_is_said_around_its_base():
    """The base method stands in the stage's fields."""
    fields = {"class": "harness.meta.meta.Method", "base": {"class": "harness.unlearning.ca.Method", "steps": 0}, "steps": 9}
    assert inventory.stage(fields) == "meta around ca 0 steps 9 steps"


@pytest.mark.parametrize("record", [{}, {"key": 1, "base": 2, "stages": 3}, {"key": "k", "base": "b", "stages": [{}]}])
def test_a_record_that_says_nothing_is_listed_all_the_same(tmp_path, capsys, record):
    """A listing never stops half-way."""
    kept(Store(tmp_path), "checkpoints", record, "odd-1")
    code, lines = said(capsys, "ls", "--store", str(tmp_path))
    assert (code, lines[0].split()[0]) == (0, "checkpoints/odd-1")
    assert "says nothing about where it comes from" in lines[0]


def test_torch_is_not_loaded(store):
    """Looking into a store takes no second."""
    code = f"import sys; from harness.__main__ import main; main(['store', 'ls', '--store', {str(store.root)!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


# --- checking --------------------------------------------------------------------------------------------------------


def test_a_sound_store_is_verified(store, capsys):
    """Exit 0, and how many there were."""
    assert said(capsys, "verify", "--store", str(store.root)) == (0, ["4 artefacts, 0 damaged"])


@pytest.mark.parametrize("kind", ["checkpoints", "images", "scores"])
@pytest.mark.parametrize("file", ["data", RECORD])
def test_damage_is_named_and_the_exit_code_is_1(store, capsys, kind, file):
    """A flipped bit in any file of any kind."""
    folder = store.folder(kind, store.addresses(kind)[0])
    path = folder / ("weights" if (kind, file) == ("checkpoints", "data") else file)
    data = bytearray(path.read_bytes())
    data[data.index(b'"record"') + 20 if file == RECORD else 0] ^= 1
    path.write_bytes(data)
    code, lines = said(capsys, "verify", "--store", str(store.root))
    assert (code, len(lines), lines[-1]) == (1, 2, "4 artefacts, 1 damaged")
    assert lines[0].startswith(f"{kind}/{folder.name}: ")


def test_an_artefact_at_anothers_address_is_damage(store, capsys):
    """Whole files under the wrong name would be taken for another model."""
    first, second = (store.folder("checkpoints", address) for address in store.addresses("checkpoints"))
    second.rename(second.with_name("moved-1"))
    scores = store.folder("scores", store.addresses("scores")[0])
    scores.rename(scores.with_name("0" * 32))
    code, lines = said(capsys, "verify", "--store", str(store.root))
    assert (code, lines[-1]) == (1, "4 artefacts, 2 damaged")
    assert [line.partition(":")[0] for line in lines[:-1]] == ["checkpoints/moved-1", f"scores/{'0' * 32}"]
    assert first.name not in "".join(lines)


def test_a_record_with_anothers_key_is_damage(tmp_path):
    """The key must be that of the stages beside it."""
    store = Store(tmp_path)
    folder = checkpoint(store, STAGES)
    record = {**store.record(folder), "key": "another"}
    wrong = kept(store, "checkpoints", record, folder.name.replace("-50", "-51"))
    assert "key is not that of its stages" in inventory.damage(store, inventory.Artefact(wrong))


def test_no_flipped_bit_of_a_record_is_missed(tmp_path):
    """Whichever byte of record.json changes, reading fails or says the same as before."""
    store = Store(tmp_path)
    folder = kept(store, "scores", {"images": "abc", "detector": "eyes", "n": 17})
    whole, before = (folder / RECORD).read_bytes(), store.read(folder)
    noticed = 0
    for at in range(len(whole)):
        (folder / RECORD).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            assert store.read(folder) == before
        except StoreError:
            noticed += 1
    assert noticed > len(whole) / 2


def test_a_record_without_a_seal_is_read(store):
    """Artefacts from before records were sealed."""
    folder = store.folder("scores", store.addresses("scores")[0])
    whole = json.loads((folder / RECORD).read_text())
    del whole["digest"]
    (folder / RECORD).write_text(json.dumps(whole))
    assert store.read(folder) == {"images": "images-1", "detector": "eyes"}


def test_a_record_that_names_a_file_elsewhere_is_refused(store):
    """A record that somebody made by hand cannot point out of its folder."""
    folder = store.folder("scores", store.addresses("scores")[0])
    whole = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({"record": whole["record"], "files": {"../../secret": "0"}}))
    with pytest.raises(StoreError, match="would lie outside"):
        store.read(folder)


def test_a_store_that_is_not_there_is_not_made(tmp_path, capsys):
    """A typing error in --store is an error and leaves no folder."""
    assert main(["store", "ls", "--store", str(tmp_path / "nowhere")]) == 2
    assert "no store at" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


# --- cleaning --------------------------------------------------------------------------------------------------------


def litter(store: Store) -> tuple[Path, Path]:
    """A killed writer's draft and a fresh one, both with their record already."""
    drafts = store.root / "images" / ".a.1", store.root / "images" / ".b.2"
    for draft in drafts:
        shutil.copytree(store.folder("images", "images-1"), draft)
    aged(drafts[0], inventory.DRAFT + 60)
    return drafts


def test_nothing_is_deleted_unless_asked(store, capsys):
    """It says what it would do, and does it with --delete; a draft that may be somebody's stays, and so does what is finished."""
    old, fresh = litter(store)
    with store.lease("given up"):
        pass
    before = sorted(store.root.rglob("*"))
    code, lines = said(capsys, "gc", "--store", str(store.root))
    assert (code, sorted(store.root.rglob("*"))) == (0, before)
    assert [line.split(":")[0] for line in lines[:-1]] == ["would delete images/.a.1", "would delete locks/given up.lock"]
    assert "2 things" in lines[-1]
    assert "nothing was deleted" in lines[-1]
    said(capsys, "gc", "--store", str(store.root), "--delete")
    assert not old.exists()
    assert fresh.exists()
    assert list((store.root / "locks").iterdir()) == []
    assert said(capsys, "verify", "--store", str(store.root)) == (0, ["4 artefacts, 0 damaged"])


def test_a_lock_that_is_held_stays(store, capsys):
    """Its holder goes on undisturbed."""
    with store.lease("mine"):
        code = f"import sys; from harness.__main__ import main; sys.exit(main(['store', 'gc', '--delete', '--store', {str(store.root)!r}]))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
        assert (store.root / "locks" / "mine.lock").exists()


def test_what_nobody_used_for_long_may_go(store, capsys):
    """--older-than counts from the last use: reading an artefact keeps it."""
    one, two = (store.folder("checkpoints", address) for address in store.addresses("checkpoints"))
    aged(one, 20 * 86400)
    aged(two, 20 * 86400)
    store.read(two)
    _, lines = said(capsys, "gc", "--older-than", "10", "--store", str(store.root))
    assert [line for line in lines if "not used" in line] == [f"would delete checkpoints/{one.name}: not used for 20 days"]
    assert store.has(one)
    said(capsys, "gc", "--older-than", "10", "--delete", "--store", str(store.root))
    assert (store.has(one), store.has(two)) == (False, True)
    assert len(store.addresses("images")) == len(store.addresses("scores")) == 1
    assert list(one.parent.glob(".*")) == []


def test_a_draft_that_is_written_into_stays(store):
    """A writer may take hours over one file: then the file is young, and its folder is old."""
    old, _ = litter(store)
    assert list(inventory.leftovers(store)) == [old]
    os.utime(old / "data")
    assert list(inventory.leftovers(store)) == []


def test_it_says_how_much_may_go(store, capsys):
    """The sizes of what killed writers left behind are added up."""
    old, _ = litter(store)
    (old / "more").write_bytes(bytes(2_000_000))
    aged(old, inventory.DRAFT + 60)
    assert "1 things, 2.0 MB" in said(capsys, "gc", "--store", str(store.root))[1][-1]


def test_everything_may_go(store, capsys):
    """--older-than 0 names all artefacts."""
    _, lines = said(capsys, "gc", "--older-than", "0", "--store", str(store.root))
    assert sum("not used for 0 days" in line for line in lines) == 4


def test_what_is_deleted_is_gone_at_once(store, monkeypatch):
    """Killed in the middle of deleting, the store has no half artefact: what is left of it is a draft, which the next gc takes away."""
    folder = store.folder("images", "images-1")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inventory.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        inventory.remove(store, inventory.Artefact(folder))
    assert not store.has(folder)
    assert store.addresses("images") == []
    (rest,) = (store.root / "images").iterdir()
    aged(rest, inventory.DRAFT + 60)
    assert list(inventory.leftovers(store)) == [rest]
