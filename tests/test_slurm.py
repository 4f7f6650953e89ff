"""The Slurm example, on this machine instead of a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.store import Store

ROOT = Path(__file__).parents[1]


def test_the_example_runs_its_workers(tmp_path):
    """Two workers are given the same jobs, find all of them done, and end well; a file that is no job ends badly."""
    pytest.importorskip("submitit", reason="pip install 'resurgence[slurm]'")
    store, jobs = Store(tmp_path / "store"), tmp_path / "jobs"
    jobs.mkdir()
    for i in range(2):
        store.publish(store.folder("images", str(i)), lambda draft: {})
        (jobs / f"{i}.json").write_text(json.dumps({"kind": "images", "address": str(i), "needs": []}))
    command = [sys.executable, str(ROOT / "reports/examples/slurm.py"), str(jobs), "--store", str(store.root), "--workers", "2", "--gpus", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--cluster", "local"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = "".join(path.read_text() for path in (tmp_path / "slurm-logs").glob("*.out"))
    assert said.count("done 0.json") == said.count("done 1.json") == 2
    (jobs / "2.json").write_text("{}")
    assert subprocess.run([*command, "--cluster", "local"], cwd=tmp_path, env=environment, capture_output=True, check=False).returncode != 0
