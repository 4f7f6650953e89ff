"""Stages of a plan on a Slurm cluster: an array of equal workers, each with one GPU, that share the jobs through the store.

    pytest suites/celebrity --model ... --method ... --store /shared/store --plan --jobs /shared/jobs
    python slurm.py /shared/jobs --store /shared/store --workers 8 --minutes 240 --partition gpu
    pytest suites/celebrity --model ... --method ... --store /shared/store -n 4

All three must compute in the same precision: where the first runs without a GPU, set RESURGENCE_DTYPE (bfloat16 or float32) for the first and the last.
A worker takes what no other is making. One that is killed, or runs out of time, loses the stage it was at; the same command again does
what is left. Needs `pip install submitit`; `--cluster local` tries it on this machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import submitit


def work(folder: str, store: str) -> None:
    """One worker: all jobs, of which it does those that are free."""
    files = sorted(map(str, Path(folder).glob("*.json")))
    subprocess.run([sys.executable, "-m", "harness", "run", *files, "--store", store], check=True)


def main() -> None:
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="job files, on a disk that all nodes share")
    parser.add_argument("--store", required=True, help="a folder on that disk, or a URL")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--minutes", type=int, default=240)
    parser.add_argument("--gpus", type=int, default=1, help="of each worker")
    parser.add_argument("--partition")
    parser.add_argument("--cluster", default="slurm", choices=["slurm", "local"])
    given = parser.parse_args()
    executor = submitit.AutoExecutor(folder="slurm-logs", cluster=given.cluster)
    executor.update_parameters(timeout_min=given.minutes, gpus_per_node=given.gpus)
    if given.partition:
        executor.update_parameters(slurm_partition=given.partition)
    for job in executor.map_array(work, [given.folder] * given.workers, [given.store] * given.workers):
        job.result()


if __name__ == "__main__":
    main()
