"""Job files on a Ray cluster of two local nodes, one of which is lost on the way; of a few stages, and of a whole suite."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="pip install 'resurgence[ray]'")

from harness import cluster, jobfiles, jobs  # noqa: E402  # after the question whether Ray is there
from harness.bench.gate import SUITE, Bench  # noqa: E402
from harness.engine import Engine  # noqa: E402
from harness.finetuning import lora  # noqa: E402
from harness.spec import ImageSet, Lineage  # noqa: E402
from harness.store import Store  # noqa: E402
from harness.unlearning import dimum, uce  # noqa: E402
from tests import tiny  # noqa: E402
from tests.conftest import eventually  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
TASK = tiny.task()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head and a second node, one CPU each; this process is connected."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default its tasks give way to everything else on the machine
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    found.extra = found.add_node(num_cpus=1)
    ray.init(address=found.address, logging_level="error", log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


def laid(folder: Path, base: Any) -> tuple[dict[str, str], list[jobs.Job]]:
    """Job files of two methods with a fine-tune each and pictures, by name."""
    root = Lineage(base, TASK)
    tuned = lora.Finetune(steps=2, batch=1, images_per_prompt=1)
    ends = [root.then(stage, tuned) for stage in (dimum.Method(steps=2, batch=1, images_per_prompt=1), uce.Method())]
    every = jobs.ordered(ends, [(end, (ImageSet(("a x", "the y"), (1, 2)), TASK.sampler)) for end in ends])
    return {path.name: path.read_text() for path in jobfiles.write(folder, every)}, every


def test_a_lost_node_changes_nothing(nodes, base, tmp_path):
    """Its tasks are started again elsewhere, what was finished is not made again, and the bytes are those of one engine."""
    texts, every = laid(tmp_path / "jobs", base)
    store, alone = Store(tmp_path / "store"), Store(tmp_path / "alone")
    finished = {}

    def lose() -> None:
        eventually(lambda: len(store.addresses("images")) > 1)
        finished.update({job.place: store.folder(*job.place).stat().st_ino for job in every if store.has(store.folder(*job.place))})
        nodes.remove_node(nodes.extra)

    killer = threading.Thread(target=lose)
    killer.start()
    assert cluster.done(ray, texts, str(store.root), 0) == {}
    killer.join()
    assert finished
    engine = Engine(alone)
    for job in every:
        engine.make(job)
        here, there = (each.folder(*job.place) for each in (store, alone))
        assert {p.name: p.read_bytes() for p in here.glob("*.safetensors")} == {p.name: p.read_bytes() for p in there.glob("*.safetensors")}
    assert all(store.folder(*place).stat().st_ino == inode for place, inode in finished.items())
    assert cluster.done(ray, texts, str(store.root), 0) == {}


def test_a_failing_stage_is_named_with_what_needed_it(nodes, base, tmp_path):
    """The others are made."""
    texts, every = laid(tmp_path / "jobs", base)
    broken = replace(every[-1].lineage, stages=(uce.Method(ridge=0.0, preserve=0.0),))
    texts["broken"] = json.dumps(jobfiles.describe(jobs.Job(broken)))
    failed = cluster.done(ray, texts, str(tmp_path / "store"), 0)
    assert list(failed) == ["broken"]
    assert "singular" in failed["broken"]


def spied(log: Path) -> Any:
    """Ray, with a line in a file where a task starts and where it ends: what, on which node, whether the store had it."""

    def remote(**options: Any) -> Any:
        def wrap(make: Any) -> Any:
            def task(text: str, store: str, *needs: object) -> bool:
                job, node = json.loads(text), ray.get_runtime_context().get_node_id()
                there = (Path(store) / job["kind"] / job["address"] / "record.json").is_file()
                with log.open("a") as file:
                    file.write(f"start {job['address']} {node} {there}\n")
                result = make(text, store, *needs)
                with log.open("a") as file:
                    file.write(f"end {job['address']} {node} True\n")
                return bool(result)

            return ray.remote(**options)(task)

        return wrap

    return SimpleNamespace(remote=remote, get=ray.get, exceptions=ray.exceptions)


def read(log: Path) -> list[list[str]]:
    """What the tasks wrote."""
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def unfinished(log: Path, head: str) -> list[str]:
    """What the other node than the head is making, once three jobs are done somewhere."""
    lines = read(log)
    ended = {address for event, address, *_ in lines if event == "end"}
    return [address for event, address, where, _ in lines if event == "start" and where != head and address not in ended] if len(ended) > 2 else []


def test_a_suite_keeps_its_verdicts_when_a_node_is_killed(nodes, tmp_path):
    """The celebrity suite on the pocket model: what the killed node was making is made elsewhere, what was finished is not; the claims are one machine's."""
    bench, store, log = Bench(tmp_path / "runs", quick=True), Store(tmp_path / "runs" / "shared"), tmp_path / "log.txt"
    alone = bench.gate("alone", "store-alone")
    _, code, said = bench.pytest(SUITE, *bench.selection, "--store", str(store.root), "--plan", "--jobs", str(tmp_path / "jobs"))
    assert code == 0, said
    texts = {path.name: jobfiles.read(path) for path in sorted((tmp_path / "jobs").iterdir())}
    head, lost = ray.get_runtime_context().get_node_id(), list[str]()

    def lose() -> None:
        any(eventually(lambda: bool(unfinished(log, head))) for _ in range(6))  # torch is imported first
        lost.extend(unfinished(log, head))
        nodes.remove_node(nodes.extra, allow_graceful=False)

    killer = threading.Thread(target=lose)
    killer.start()
    assert cluster.done(spied(log), texts, str(store.root), 0) == {}
    killer.join()
    ended: set[str] = set()
    for event, address, _, there in read(log):
        assert event == "end" or there == "True" or address not in ended  # whatever was finished is not made again
        ended |= {address} if event == "end" else set()
    assert len(ended) == len(texts)
    assert set(lost) <= ended
    assert lost
    after = bench.gate("after", "shared")
    said_of = [
        {claim["id"]: [claim[name] for name in ("verdict", "word", "rate", "hits", "lineage")] for claim in ran.verdict["claims"]} for ran in (alone, after)
    ]
    assert said_of[0] == said_of[1] != {}
    assert after.verdict["run"]["images"] < alone.verdict["run"]["images"]
