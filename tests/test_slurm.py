"""The Slurm example, on this machine instead of a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import jobfiles, jobs
from harness.spec import ImageSet, Lineage
from harness.store import Store
from harness.unlearning import uce
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_example_runs_its_workers(tmp_path, base):
    """Two workers share a model and its pictures and end well when both are there; a file that is no job ends badly."""
    pytest.importorskip("submitit", reason="pip install 'resurgence[slurm]'")
    store, folder = Store(tmp_path / "store"), tmp_path / "jobs"
    unlearned = Lineage(base, tiny.task(), (uce.Method(),))
    every = jobs.ordered([unlearned], [(unlearned, (ImageSet(("a x",), (1,)), unlearned.task.sampler))])
    names = [path.name for path in jobfiles.write(folder, every)]
    command = [sys.executable, str(ROOT / "reports/examples/slurm.py"), str(folder), "--store", str(store.root), "--workers", "2", "--gpus", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--cluster", "local"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(store.has(store.folder(*job.place)) for job in every)
    said = "".join(path.read_text() for path in (tmp_path / "slurm-logs").glob("*.out"))
    assert [said.count(f"done {name}") for name in names] == [2, 2]
    (folder / "2.json").write_text("{}")
    assert subprocess.run([*command, "--cluster", "local"], cwd=tmp_path, env=environment, capture_output=True, check=False).returncode != 0
