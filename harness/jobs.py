"""What has to be made for a question, piece by piece and in order; and how several processes share the pieces."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from harness import catalogue
from harness.errors import ResurgenceError, SpecError
from harness.spec import ImageSet, Lineage, Sampler, key

if TYPE_CHECKING:
    from harness.engine import Engine

Wanted = tuple[ImageSet, Sampler]  # which images, drawn how
CHECKPOINTS, IMAGES = "checkpoints", "images"


@dataclass(frozen=True)
class Job:
    """One artefact that can be made on its own once what it needs is there: a checkpoint, or images that a model draws."""

    lineage: Lineage
    wanted: Wanted | None = None  # None: the checkpoint itself

    @cached_property
    def place(self) -> tuple[str, str]:
        """Kind and address in the store. Snapshots of one trajectory are siblings."""
        if self.wanted is not None:
            return IMAGES, key([self.lineage.key, *self.wanted])
        return CHECKPOINTS, f"{self.lineage.trajectory}-{self.lineage.steps}"

    @property
    def lease(self) -> str:
        """What a process holds while it makes this: snapshots of one trajectory are made one after the other."""
        return self.lineage.trajectory if self.wanted is None else self.place[1]

    @cached_property
    def needs(self) -> tuple[Job, ...]:
        """What must be there first: the model that draws; or the images that a stage learns from, and the model it starts from."""
        if self.wanted is not None:
            return (Job(self.lineage),) if self.lineage.stages else ()
        sets = [Job(root(self.lineage), wanted) for _, wanted in needed(self.lineage)]
        return (*sets, Job(self.lineage.parent)) if len(self.lineage.stages) > 1 else tuple(sets)


def root(lineage: Lineage) -> Lineage:
    """The base model that it comes from."""
    return replace(lineage, stages=())


def needed(lineage: Lineage) -> list[tuple[str, Wanted]]:
    """The image sets that the last stage, which must fit the model's family, wants from the base model."""
    from harness import pipeline  # which takes torch

    stage = lineage.stages[-1]
    catalogue.fits(stage, pipeline.family(lineage.base))
    chosen = stage.images(lineage.task.view(stage.reads))
    if chosen and "sampler" not in stage.reads:
        raise SpecError(f"{type(stage).__module__} learns from images and does not read their sampler; add 'sampler' to `reads`, which make its address")
    return [(name, (each, lineage.task.sampler)) for name, each in chosen.items()]


def ordered(lineages: Iterable[Lineage], pictures: Iterable[tuple[Lineage, Wanted]] = ()) -> list[Job]:
    """Everything that these checkpoints and images take, each once: what is needed first comes first, short runs before long ones."""
    jobs: dict[tuple[str, str], Job] = {}
    for lineage in sorted(lineages, key=lambda each: each.steps):
        for depth in range(1, len(lineage.stages) + 1):
            job = Job(replace(lineage, stages=lineage.stages[:depth]))
            for each in (*(need for need in job.needs if need.wanted is not None), job):
                jobs.setdefault(each.place, each)
    for lineage, wanted in pictures:
        job = Job(lineage, wanted)
        jobs.setdefault(job.place, job)
    return list(jobs.values())


def build(engine: Engine, jobs: Iterable[Job]) -> dict[Path, ResurgenceError]:
    """Do all jobs, sharing them with other processes on the same store; the error of each that could not be done.

    Takes whatever is missing and not being made by another; waits only when nothing else is left to do.
    """
    places = {engine.store.folder(*job.place): job for job in jobs}
    failures: dict[Path, ResurgenceError] = {}
    while open_jobs := [(f, job) for f, job in places.items() if f not in failures and not engine.store.has(f)]:
        for folder, job in open_jobs:
            needs = [engine.store.folder(*need.place) for need in job.needs]
            if blocker := next((failures[need] for need in needs if need in failures), None):
                failures[folder] = blocker
            elif all(engine.store.has(need) for need in needs) and _take(engine, folder, job, failures):
                break
        else:
            time.sleep(engine.store.poll)
    return failures


def _take(engine: Engine, folder: Path, job: Job, failures: dict[Path, ResurgenceError]) -> bool:
    """Do a job unless another process holds it; says whether it was done."""
    with engine.store.lease(job.lease, wait=False) as mine:
        if not mine:
            return False
        try:
            engine.make(job)
        except ResurgenceError as error:
            failures[folder] = error
        return True
