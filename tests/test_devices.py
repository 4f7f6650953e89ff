"""Who gets which GPU, and how many threads."""

from __future__ import annotations

import pytest

from fixtures.devices import _count, enough, pin
from harness.errors import SpecError


def pinned(worker: str | None, gpus: int, count: str = "4", **environ: str) -> dict[str, str]:
    """What `pin` adds or changes in the environment of a worker."""
    if worker is not None:
        environ |= {"PYTEST_XDIST_WORKER": worker, "PYTEST_XDIST_WORKER_COUNT": count}
    after = dict(environ)
    pin(after, gpus)
    return {name: value for name, value in after.items() if environ.get(name) != value}


@pytest.mark.parametrize(("worker", "device"), [("gw0", "0"), ("gw1", "1"), ("gw2", "0"), ("gw11", "1")])
def test_workers_share_the_gpus_in_turn(worker, device):
    """Worker i of a machine with two GPUs gets GPU i modulo 2, and keeps its threads."""
    assert pinned(worker, gpus=2) == {"CUDA_VISIBLE_DEVICES": device}


@pytest.mark.parametrize(("worker", "device"), [("gw0", "5"), ("gw1", "GPU-3f"), ("gw2", "5")])
def test_a_worker_takes_from_what_the_caller_shows(worker, device):
    """A worker takes entry i of the caller's CUDA_VISIBLE_DEVICES, so a hidden GPU stays hidden."""
    assert pinned(worker, gpus=8, CUDA_VISIBLE_DEVICES="5, GPU-3f,") == {"CUDA_VISIBLE_DEVICES": device}


@pytest.mark.parametrize("worker", ["gw0", "gw3"])
def test_a_set_variable_is_trusted(worker):
    """Where the driver shows nothing, as in some containers and under WSL, workers share what the caller names, and keep their threads."""
    assert pinned(worker, gpus=0, CUDA_VISIBLE_DEVICES="0,1,2,3") == {"CUDA_VISIBLE_DEVICES": worker[2:]}


@pytest.mark.parametrize("hidden", ["", " ", "-1", "NoDevFiles"])
def test_a_caller_who_hides_every_gpu_gets_cpu_workers(hidden):
    """An empty CUDA_VISIBLE_DEVICES, -1, or Slurm's word for none hides every GPU: it stays as it is and each worker takes one thread."""
    assert pinned("gw1", gpus=2, CUDA_VISIBLE_DEVICES=hidden) == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("worker", [None, "master", "", "gw", "gwx"])
@pytest.mark.parametrize("gpus", [0, 2])
def test_a_lone_process_is_left_alone(worker, gpus):
    """Without xdist nothing is changed: one process may use every GPU and every core."""
    assert pinned(worker, gpus) == {}


def test_cpu_workers_take_one_thread_each():
    """Where there is no GPU each of several workers takes one thread."""
    assert pinned("gw3", gpus=0) == {"OMP_NUM_THREADS": "1"}


def test_a_single_cpu_worker_keeps_all_threads():
    """With -n 1 there is nobody to share the cores with."""
    assert pinned("gw0", gpus=0, count="1") == {}


def test_the_callers_thread_count_wins():
    """OMP_NUM_THREADS set by the caller is kept."""
    assert pinned("gw0", gpus=0, OMP_NUM_THREADS="3") == {}


def test_gpus_are_counted_without_torch(monkeypatch):
    """Unless told otherwise, `pin` counts the GPUs itself."""
    monkeypatch.setattr("fixtures.devices._count", lambda: 3)
    environ = {"PYTEST_XDIST_WORKER": "gw5"}
    pin(environ)
    assert environ == {"PYTEST_XDIST_WORKER": "gw5", "CUDA_VISIBLE_DEVICES": "2"}


@pytest.mark.parametrize(
    ("shown", "count"),
    [([], 0), (["proc/driver/nvidia/gpus/0000:01", "dev/nvidia0", "dev/nvidia1"], 1), (["dev/nvidia3", "dev/nvidia0", "dev/nvidiactl", "dev/nvidia-uvm"], 2)],
)
def test_where_the_driver_lists_no_gpu_its_devices_count(tmp_path, shown, count):
    """What the driver lists, or else the devices themselves; what controls them is none."""
    for name in shown:
        (tmp_path / name).mkdir(parents=True)
    assert _count(tmp_path) == count


@pytest.mark.parametrize(("gpus", "environ"), [(4, {}), (0, {}), (1, {"CUDA_VISIBLE_DEVICES": "0,0,2,2"}), (1, {"CUDA_VISIBLE_DEVICES": ""})])
def test_enough_gpus(gpus, environ):
    """One each, one named as often as it is shared, or none at all."""
    enough(environ, 4, gpus)


@pytest.mark.parametrize(
    ("gpus", "environ", "says"),
    [
        (1, {}, r"3 workers, .* and 1 GPU \(0\); start at most -n 1, .* CUDA_VISIBLE_DEVICES=0,0,0"),
        (0, {"CUDA_VISIBLE_DEVICES": "5,GPU-3f"}, r"3 workers, .* and 2 GPUs \(5, GPU-3f\); start at most -n 2, .* CUDA_VISIBLE_DEVICES=5,GPU-3f,5"),
    ],
)
def test_more_workers_than_gpus_are_refused(gpus, environ, says):
    """With both ways out: fewer workers, or a GPU named as often as it should be shared."""
    with pytest.raises(SpecError, match=says):
        enough(environ, 3, gpus)
