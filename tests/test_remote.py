"""A store behind a URL: pushed, pulled, checked, raced for and leased. In memory, and against S3's protocol where moto is installed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from harness import remote as module
from harness.__main__ import main
from harness.errors import StoreError
from harness.remote import Remote
from harness.store import RECORD, Store, open_store

BUCKET = "memory://bucket/prefix"


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty bucket, and caches in the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of moto's server, whose answers are S3's."""
    pytest.importorskip("s3fs", reason="pip install 'resurgence[s3]'")
    server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'").ThreadedMotoServer(port=0, verbose=False)
    patch = pytest.MonkeyPatch()
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "*"}.items():
        patch.setenv(name, value)
    server.start()
    host, port = server.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket/prefix"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()
    patch.undo()


@pytest.fixture(params=["memory", "s3"])
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kind of bucket, empty."""
    url = BUCKET if request.param == "memory" else request.getfixturevalue("s3")
    filesystem, path = fsspec.core.url_to_fs(url)
    yield url
    filesystem.invalidate_cache()
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def at(url: str, place: Path) -> Remote:
    """The bucket as another machine sees it: through a folder of its own."""
    return Remote(url, place)


def writer(word: bytes) -> Callable[[Path], dict[str, Any]]:
    """Fills a folder with files that say who wrote them."""

    def write(folder: Path) -> dict[str, Any]:
        for name in ("a.bin", "b.bin"):
            (folder / name).write_bytes(word * 100)
        return {"writer": word.decode()}

    return write


def folder(store: Store, address: str = "address") -> Path:
    """An artefact's place."""
    return store.folder("kind", address)


def words(store: Store, address: str = "address") -> set[str]:
    """Who wrote an artefact's files and its record."""
    return {store.read(folder(store, address))["writer"], *(path.read_text()[:3] for path in folder(store, address).glob("*.bin"))}


def objects(url: str) -> list[str]:
    """What lies in the bucket, below the prefix."""
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    return sorted(name.partition("prefix/")[2] for name in filesystem.find(path))


def test_what_one_machine_publishes_another_reads(bucket, tmp_path):
    """Through the bucket alone; what was read lies in the local folder and is sound there."""
    here, there = at(bucket, tmp_path / "here"), at(bucket, tmp_path / "there")
    assert not there.has(folder(there))
    here.publish(folder(here), writer(b"one"))
    assert there.has(folder(there))
    assert there.addresses("kind") == ["address"]
    assert there.kinds() == ["kind"]
    assert there.record(folder(there)) == {"writer": "one"}
    assert not folder(there).exists()
    assert words(there) == {"one"}
    assert Store(tmp_path / "there").read(folder(there)) == {"writer": "one"}
    assert [name.partition("/")[2].split(".", 1)[-1] for name in objects(bucket) if RECORD not in name] == ["a.bin", "b.bin"]


def test_the_first_writer_wins_and_the_second_reads_the_firsts(bucket, tmp_path):
    """A model made twice, with other bits, is one model for everybody."""
    here, there = at(bucket, tmp_path / "here"), at(bucket, tmp_path / "there")
    here.publish(folder(here), writer(b"one"))
    there.publish(folder(there), writer(b"two"))
    assert words(there) == {"one"}
    assert words(here) == {"one"}
    assert list(folder(there).parent.glob(".*")) == []


def test_a_race_leaves_one_whole_artefact(bucket, tmp_path):
    """Writers with other bytes that publish one key at the same moment: none fails, and all read one and the same."""
    stores = {word: at(bucket, tmp_path / word.decode()) for word in (b"one", b"two")}
    start, failed = threading.Barrier(len(stores)), []

    def race(word: bytes) -> None:
        try:
            for i in range(5):
                start.wait(30)
                stores[word].publish(folder(stores[word], str(i)), writer(word))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=race, args=(word,)) for word in stores]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert failed == []
    fresh = at(bucket, tmp_path / "fresh")
    for i in range(5):
        seen = [words(store, str(i)) for store in (*stores.values(), fresh)]
        assert seen[0] in ({"one"}, {"two"})
        assert seen == [seen[0]] * 3


def test_an_artefact_without_its_record_is_none(bucket, tmp_path, monkeypatch):
    """A writer that is killed between its files and its record leaves nothing that anybody reads, here or there; the next one succeeds."""
    here, there = at(bucket, tmp_path / "here"), at(bucket, tmp_path / "there")

    class Killed(BaseException):
        """Not an error that anybody handles."""

    def dies(*_: Any) -> bool:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(here, "_create", dies)
        with pytest.raises(Killed):
            here.publish(folder(here), writer(b"one"))
    assert len(objects(bucket)) == 2
    assert not here.has(folder(here))
    assert not there.has(folder(there))
    there.publish(folder(there), writer(b"two"))
    assert words(here) == words(there) == {"two"}


@pytest.mark.parametrize("name", ["a.bin", RECORD])
def test_damage_in_the_bucket_never_gets_here(bucket, tmp_path, name):
    """A flipped bit there is an error that names the address there; nothing is left in the local folder."""
    here, there = at(bucket, tmp_path / "here"), at(bucket, tmp_path / "there")
    here.publish(folder(here), writer(b"one"))
    filesystem, path = fsspec.core.url_to_fs(bucket)
    target = next(each for each in filesystem.find(path) if each.endswith(name))
    data = bytearray(filesystem.cat_file(target))
    data[data.index(b"one")] ^= 1
    filesystem.pipe_file(target, bytes(data))
    with pytest.raises(StoreError, match=r"is damaged: .* changed since it was written; delete it there"):
        there.read(folder(there))
    assert list((tmp_path / "there").glob("kind/*")) == []
    assert words(here) == {"one"}


def test_damage_here_is_noticed_and_mended_by_pulling_again(tmp_path):
    """The message of a local store holds: delete the folder and run again."""
    here = at(BUCKET, tmp_path / "here")
    here.publish(folder(here), writer(b"one"))
    (folder(here) / "a.bin").write_bytes(b"x")
    with pytest.raises(StoreError, match="delete the folder and run again"):
        here.read(folder(here))
    for path in folder(here).iterdir():
        path.unlink()
    folder(here).rmdir()
    assert words(here) == {"one"}


def test_verify_looks_at_the_whole_bucket(tmp_path, capsys):
    """`python -m harness store verify --store URL` fetches what is not here."""
    here = at(BUCKET, tmp_path / "here")
    here.publish(here.folder("images", "sound"), writer(b"one"))
    here.publish(here.folder("images", "broken"), writer(b"two"))
    filesystem = fsspec.filesystem("memory")
    target = next(path for path in filesystem.find("/bucket") if "broken" in path and path.endswith("b.bin"))
    filesystem.pipe_file(target, b"x")
    assert main(["store", "verify", "--store", BUCKET]) == 1
    assert capsys.readouterr().out.splitlines()[0].startswith("images/broken: ")


def test_a_bucket_that_does_not_answer_is_a_store_error(tmp_path, monkeypatch):
    """Whatever the filesystem raises is said with the address; nothing is taken for absent."""
    here = at(BUCKET, tmp_path / "here")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("403 Forbidden")

    for call in ("exists", "put_file", "pipe_file", "glob", "cat_file"):
        with monkeypatch.context() as patch:
            patch.setattr(here._fs, call, refuse)
            with pytest.raises(StoreError, match="memory://bucket/prefix does not answer as a store: PermissionError: 403 Forbidden"):
                {
                    "exists": lambda: here.has(folder(here)),
                    "glob": lambda: here.addresses("kind"),
                    "cat_file": lambda: here.record(folder(here)),
                }.get(call, lambda: here.publish(folder(here), writer(b"one")))()
    assert not here.has(folder(here))


def test_a_local_folder_that_is_full(tmp_path, monkeypatch):
    """Pulling says so in the words of a local store, and leaves nothing."""
    here, there = at(BUCKET, tmp_path / "here"), at(BUCKET, tmp_path / "there")
    here.publish(folder(here), writer(b"one"))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        with pytest.raises(StoreError, match="No space left on device; is the disk full"):
            there.read(folder(there))
    assert list((tmp_path / "there").glob("kind/*")) == []
    assert words(there) == {"one"}


def test_which_store_a_place_names(tmp_path):
    """A folder, a file:// URL, a bucket; what cannot be opened is an error that says what to install or to write."""
    assert type(open_store(tmp_path)) is type(open_store(f"file://{tmp_path}")) is Store
    assert open_store(f"file://{tmp_path}").root == tmp_path
    assert isinstance(open_store(BUCKET), Remote)
    assert open_store(BUCKET).root != open_store(f"{BUCKET}/below").root
    with pytest.raises(StoreError, match="give a folder, or a URL of s3, gs or hf"):
        open_store("nothing://bucket")


# --- leases ----------------------------------------------------------------------------------------------------------


def test_a_lease_is_held_among_machines(bucket, tmp_path):
    """Who does not wait is told False; another name is free; afterwards it is free, and no mark stays."""
    here, there = at(bucket, tmp_path / "here"), at(bucket, tmp_path / "there")
    with here.lease("a") as mine:
        assert mine
        with there.lease("a", wait=False) as other:
            assert not other
        with there.lease("b", wait=False) as free, here.lease("a", wait=False) as again:
            assert (free, again) == (True, True)
        with there.lease("a", wait=False) as other:
            assert not other
    with there.lease("a", wait=False) as later:
        assert later
    assert objects(bucket) == []


def test_who_waits_gets_it_in_the_end(tmp_path, monkeypatch):
    """A lease that another machine gives up."""
    monkeypatch.setattr(module, "POLL", 0.01)
    here, there = at(BUCKET, tmp_path / "here"), at(BUCKET, tmp_path / "there")
    order = []

    def wait() -> None:
        with there.lease("a"):
            order.append("there")

    with here.lease("a"):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        order.append("here")
    thread.join(30)
    assert order == ["here", "there"]


def test_a_dead_machines_lease_expires(tmp_path, monkeypatch):
    """Its mark is believed until it says, and then dropped."""
    here, now = at(BUCKET, tmp_path / "here"), time.time()
    path = "/bucket/prefix/locks/a.json"
    here._fs.pipe_file(path, json.dumps({"owner": "dead", "until": now + 100}).encode())
    with here.lease("a", wait=False) as mine:
        assert not mine
    monkeypatch.setattr(module.time, "time", lambda: now + 101)
    with here.lease("a", wait=False) as mine:
        assert mine
        assert json.loads(here._fs.cat_file(path))["owner"] == here._me


def test_a_killed_process_of_this_machine_holds_nothing(tmp_path):
    """Its mark has not expired, but the local lock that it held is free: nobody waits five minutes after a kill."""
    here, again = at(BUCKET, tmp_path / "here"), at(BUCKET, tmp_path / "here")
    assert here._claim("a")
    with again.lease("a", wait=False) as mine:
        assert mine
    with at(BUCKET, tmp_path / "there").lease("a", wait=False) as free:
        assert free


def test_a_lease_is_renewed_while_it_is_held(tmp_path, monkeypatch):
    """A stage that takes longer than the expiry keeps its lease."""
    monkeypatch.setattr(module, "EXPIRY", 0.3)
    here, there = at(BUCKET, tmp_path / "here"), at(BUCKET, tmp_path / "there")
    with here.lease("a"):
        mark = json.loads(here._fs.cat_file("/bucket/prefix/locks/a.json"))
        end = time.time() + 10
        while json.loads(here._fs.cat_file("/bucket/prefix/locks/a.json"))["until"] == mark["until"] and time.time() < end:
            time.sleep(0.02)
        assert time.time() < end
    with there.lease("a", wait=False) as free:
        assert free
