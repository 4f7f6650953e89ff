"""One piece of work as a file, so that any process on any machine can do it.

python -m harness run FILE [FILE ...] --store DIR_OR_URL

`pytest suites/... --plan --jobs DIR` writes one file for each checkpoint and each set of images that a selection needs and the
store lacks; their names sort in an order in which they can be done. A file holds the whole lineage: the base model by
digest and place, the task, every stage with all its fields. What it needs is named in it, and made first where it is missing.
The model computes in what the job's digest says (`+bfloat16`, or else float32), wherever the job is done and whatever RESURGENCE_DTYPE is there.
The same command started several times on one store shares the work: each process takes what no other is making.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from harness import taskfile
from harness.errors import ResurgenceError, SpecError, StoreError
from harness.jobs import Job, build, ordered
from harness.spec import Base, ImageSet, Lineage, Sampler, canonical
from harness.store import Store, open_store

AGAIN = "write the jobs again with --plan --jobs"


def describe(job: Job) -> dict[str, Any]:
    """A job as plain JSON."""
    lineage, wanted = job.lineage, job.wanted
    return {
        "kind": job.place[0],
        "address": job.place[1],
        "needs": [list(need.place) for need in job.needs],
        "base": {"digest": lineage.base.digest, "source": lineage.base.source},
        "id": lineage.task.id,
        "task": taskfile.plain(lineage.task),
        "stages": [_plain(stage) for stage in lineage.stages],
        "images": None if wanted is None else {"prompts": list(wanted[0].prompts), "seeds": list(wanted[0].seeds), "sampler": canonical(wanted[1])},
    }


def _plain(value: Any) -> Any:
    """A stage with all its fields; also those, such as a path, that are no part of its address."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(cls)}
        return {"class": f"{cls.__module__}.{cls.__qualname__}", "version": cls.version, **fields}  # type: ignore[attr-defined]  # stages have one
    return canonical(value)


def parse(data: Mapping[str, Any]) -> Job:
    """The job that `describe` wrote; an error if it would now make something else."""
    try:
        lineage = Lineage(Base(**data["base"]), taskfile.made(data["id"], dict(data["task"])), tuple(_stage(each) for each in data["stages"]))
        images = data["images"]
        wanted = images and (ImageSet(tuple(images["prompts"]), tuple(images["seeds"])), Sampler(**images["sampler"]))
        job, place = Job(lineage, wanted), _place(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"this is no job file: {type(error).__name__} {error}; {AGAIN}") from error
    if job.place != place:
        raise SpecError(
            f"the job's address is {'/'.join(place)} and its contents make {'/'.join(job.place)}: another version wrote it, or it was edited; {AGAIN}"
        )
    return job


def _stage(data: Mapping[str, Any]) -> Any:
    """A stage of the harness; a file can name no other class."""
    fields = dict(data)
    name, version = fields.pop("class"), fields.pop("version")
    module, _, attribute = name.rpartition(".")
    if not module.startswith("harness."):
        raise SpecError(f"a job names the class '{name}'; only stages of the harness are run")
    try:
        cls: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"a job names the stage '{name}', which is not here: {error}; {AGAIN}") from error
    known = dataclasses.is_dataclass(cls) and getattr(cls, "version", None) == version
    if not known:
        raise SpecError(f"a job was written for version {version} of '{name}', here it is {getattr(cls, 'version', 'no stage')}; {AGAIN}")
    given = {k: _stage(v) if isinstance(v, dict) and "class" in v else tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    made: Any = cls(**given)
    if hasattr(cls, "at") and cls.at(made.path).digest != made.digest:
        raise StoreError(f"'{made.path}' is not the model that the job was written for; put that one there, or {AGAIN}")
    return made


def write(folder: Path, jobs: Iterable[Job]) -> list[Path]:
    """One file each, in an order in which they can be done. Job files that were there before are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*-*.json"):
        old.unlink()
    paths = []
    for i, job in enumerate(jobs):
        paths.append(folder / f"{i:05d}-{job.place[0]}-{job.place[1][:12]}.json")
        paths[-1].write_text(json.dumps(describe(job), indent=1), encoding="utf-8")
    return paths


def make(texts: Iterable[str], store: Store, progress: Callable[[str], None] = lambda line: None) -> dict[tuple[str, str], ResurgenceError]:
    """Do jobs, and first what they need and the store lacks; the error of each that could not be done.

    Several processes, on one machine or many, can be given the same jobs: each takes what no other is making.
    """
    data = [json.loads(text) for text in texts]
    missing = [parse(each) for each in data if not store.has(store.folder(each["kind"], each["address"]))]
    if not missing:
        return {}
    from harness import pipeline
    from harness.engine import Engine

    for base in {job.lineage.base for job in missing}:
        if (here := pipeline.identify(base.source, pipeline.precision_of(base))).digest != base.digest:
            raise StoreError(f"the model '{here.source}' has the digest {here.digest}, the job is about {base.digest}; put that model there, or {AGAIN}")
    every = ordered((job.lineage for job in missing), [(job.lineage, job.wanted) for job in missing if job.wanted is not None])
    failures = build(Engine(store, progress), every)
    return {job.place: failures[folder] for job in missing if (folder := store.folder(*job.place)) in failures}


# --- the command line ------------------------------------------------------------------------------------------------


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="job files")
    parser.add_argument("--store", default=".store", help="folder or URL of finished work (default .store)")


def main(given: argparse.Namespace) -> int:
    """Do the jobs; the exit code is 1 if one failed."""
    texts = {path.name: read(path) for path in given.files}
    failures = make(texts.values(), open_store(given.store), lambda line: print(line, file=sys.stderr, flush=True))
    for name, text in texts.items():
        error = failures.get(_place(json.loads(text)))
        print(f"failed {name}: {error}" if error else f"done {name}", flush=True)
    return 1 if failures else 0


def _place(data: Mapping[str, Any]) -> tuple[str, str]:
    return data["kind"], data["address"]


def read(path: Path) -> str:
    """A job file's text."""
    try:
        text = path.read_text(encoding="utf-8")
        if not {"kind", "address", "needs"} <= json.loads(text).keys():
            raise ValueError("it is no job")
    except (OSError, ValueError, AttributeError) as error:
        raise SpecError(f"cannot read the job '{path}': {error}; {AGAIN}") from error
    return text
