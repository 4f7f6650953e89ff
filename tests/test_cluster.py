"""Job files on a Ray cluster of two local nodes, one of which is lost on the way."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="pip install 'resurgence[ray]'")

from harness import cluster, jobfiles, jobs  # noqa: E402  # after the question whether Ray is there
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
def nodes() -> Iterator[Any]:
    """A head and a second node, one CPU each; this process is connected."""
    from ray.cluster_utils import Cluster

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
