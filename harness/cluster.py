"""Job files on a Ray cluster: each a task with its GPUs, started when what it needs is there; the artefacts go through the store.

python -m harness ray DIR --store URL_OR_SHARED_FOLDER [--gpus 1] [--address auto]

What the store has is skipped, so the same command after a crash goes on where it stopped. A task whose node dies is started again
by Ray. The store must be one that every node reaches: a URL, or a folder on a shared disk.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import jobfiles
from harness.errors import SpecError
from harness.store import open_store

RETRIES = 3  # of a task whose process or node died; an error of the task itself is final


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of job files, from pytest --plan --jobs DIR")
    parser.add_argument("--store", required=True, help="URL, or a folder that every node sees under the same path")
    parser.add_argument("--gpus", type=float, default=1, help="GPUs of each task (default 1; 0 on a cluster without)")
    parser.add_argument("--address", help="the cluster, such as auto; without it one is started on this machine")


def main(given: argparse.Namespace) -> int:
    """Do all jobs of a folder; the exit code is 1 if one failed."""
    try:
        import ray
    except ImportError as error:
        raise SpecError("Ray is not installed: pip install 'resurgence[ray]'") from error
    store = given.store if "://" in given.store else str(Path(given.store).resolve())
    files = sorted(given.folder.glob("*.json"))
    if not files:
        raise SpecError(f"no job files in '{given.folder}'; write them with pytest --plan --jobs DIR")
    if not ray.is_initialized():
        ray.init(address=given.address, logging_level="warning")
    failed = done(ray, {path.name: jobfiles.read(path) for path in files}, store, given.gpus)
    for name, reason in failed.items():
        print(f"failed {name}: {reason}")
    print(f"{len(files) - len(failed)} of {len(files)} jobs are in the store")
    return 1 if failed else 0


def done(ray: Any, texts: Mapping[str, str], store: str, gpus: float) -> dict[str, str]:
    """Start every job that is missing, each after those it needs, and wait; what went wrong, by file name."""
    task = ray.remote(num_gpus=gpus, max_retries=RETRIES)(_make)
    here = open_store(store)
    futures: dict[tuple[str, str], Any] = {}
    names: dict[str, Any] = {}
    for name, text in texts.items():
        job = json.loads(text)
        place = (job["kind"], job["address"])
        if here.has(here.folder(*place)):
            print(f"there {name}", flush=True)
            continue
        names[name] = futures[place] = task.remote(text, store, *(futures[need] for each in job["needs"] if (need := tuple(each)) in futures))
    failed = {}
    for name, future in names.items():
        try:
            ray.get(future)
            print(f"made {name}", flush=True)
        except ray.exceptions.RayError as error:  # what a task needs and could not get is its error too
            failed[name] = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
    return failed


def _make(text: str, store: str, *needs: object) -> bool:
    """One job, in a process that Ray gave its GPUs; `needs` are only waited for."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for error in jobfiles.make([text], open_store(store)).values():
        raise error
    return True
