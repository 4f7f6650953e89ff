"""Run lineages: checkpoint -> images -> scores, each made once and kept in the store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import catalogue, pipeline, sampling
from harness.errors import PreconditionError, ResurgenceError, StoreError
from harness.pipeline import Pipe
from harness.spec import Base, ImageSet, Lineage, Sampler, Stage, key
from harness.store import Store
from harness.training import Run

Progress = Callable[[str], None]
Wanted = tuple[ImageSet, Sampler]  # which images, drawn how


@dataclass(frozen=True)
class Job:
    """One artefact that can be made on its own once what it needs is there."""

    folder: Path
    lease: str
    needs: tuple[Path, ...]
    make: Callable[[], object]


class Engine:
    """Makes and reads artefacts with one model in memory. `counts` says what it cost: passes, images, cache hits."""

    def __init__(self, store: Store, progress: Progress = lambda line: None) -> None:
        self.store = store
        self.progress = progress
        self.counts: Counter[str] = Counter()
        self._pipes: dict[Base, Pipe] = {}
        self._loaded: str | None = None
        self._asked: set[Path] = set()

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def folder(self, lineage: Lineage) -> Path:
        """Where a lineage's checkpoint is or will be; snapshots of one trajectory are siblings."""
        return self.store.folder("checkpoints", f"{lineage.trajectory}-{lineage.steps}")

    def checkpoint(self, lineage: Lineage) -> Path:
        """Make sure that the weights of `lineage` are in the store."""
        folder = self.folder(lineage)
        if not lineage.stages:
            return folder
        if self._hit(folder):
            return folder
        self.checkpoint(lineage.parent)
        sets = {name: self.images(self._root(lineage), chosen) for name, chosen in self._needed(lineage)}
        with self.store.lease(lineage.trajectory):
            if not self.store.has(folder):
                self._run_last_stage(lineage, {name: self.read_images(path) for name, path in sets.items()})
        return folder

    def load(self, lineage: Lineage) -> Pipe:
        """The model with the weights of `lineage`; the one it held before is gone."""
        if lineage.stages:
            self.checkpoint(lineage)
        pipe = self._base(lineage.base)
        if self._loaded != lineage.key:
            self._loaded = None
            pipe.reset()
            for depth in range(1, len(lineage.stages) + 1):
                part = Lineage(lineage.base, lineage.task, lineage.stages[:depth])
                self._apply(pipe, part.stages[-1], self._tensors(self.folder(part)))
            self._loaded = lineage.key
        return pipe

    def _base(self, base: Base) -> Pipe:
        if base not in self._pipes:
            self._forget()
            self._pipes[base] = pipeline.load(base)
        return self._pipes[base]

    def _forget(self) -> None:
        """Drop the model in memory."""
        self.counts["unet_passes"] = self.cost()["unet_passes"]
        self._pipes.clear()
        self._loaded = None

    def cost(self) -> dict[str, int]:
        """What this process has done so far."""
        passes = self.counts["unet_passes"] + sum(pipe.passes for pipe in self._pipes.values())
        return {"unet_passes": passes, "images": self.counts["images"], "cache_hits": self.counts["cache_hits"]}

    def _tensors(self, folder: Path, file: str = "weights.safetensors") -> dict[str, Tensor]:
        self.store.read(folder)
        return load_file(folder / file)

    @staticmethod
    def _apply(pipe: Pipe, stage: Stage, tensors: Mapping[str, Tensor]) -> None:
        merged = getattr(stage, "merged", None)  # an adapter stage turns its tensors into weights
        pipe.apply(merged(pipe, tensors) if merged else tensors)

    def _root(self, lineage: Lineage) -> Lineage:
        return Lineage(lineage.base, lineage.task)

    def _needed(self, lineage: Lineage) -> list[tuple[str, Wanted]]:
        """The image sets that the last stage, which must fit the model's family, wants from the base model."""
        stage = lineage.stages[-1]
        catalogue.fits(stage, pipeline.family(lineage.base))
        return [(name, (chosen, lineage.task.sampler)) for name, chosen in stage.images(lineage.task.view(stage.reads)).items()]

    def _snapshot(self, lineage: Lineage) -> int:
        """Steps of the longest shorter snapshot of the same trajectory, 0 if there is none."""
        folder = self.folder(lineage)
        found = [int(p.name.rpartition("-")[2]) for p in folder.parent.glob(f"{lineage.trajectory}-*") if self.store.has(p)]
        return max((steps for steps in found if 0 < steps < lineage.steps), default=0)

    def _run_last_stage(self, lineage: Lineage, images: Mapping[str, Tensor]) -> None:
        """Train the last stage of `lineage` on top of its parent and publish what changed."""
        stage, started = lineage.stages[-1], time.monotonic()
        pipe = self.load(lineage.parent)
        self._loaded = None
        mine = pipeline.group(stage.trains)
        pipe.remember([name for name in pipe.named() if mine(name)])
        before = {name: p.detach().clone() for name, p in pipe.named().items() if mine(name)}
        others = {name: _print(p) for name, p in pipe.named().items() if not mine(name)}
        run = Run(stage.seed, images, before, start=self._snapshot(lineage), report=self._reporter(lineage))
        if run.start:
            self._resume(lineage, pipe, run)
        try:
            stage(pipe, lineage.task.view(stage.reads), run)
            result = run.adapter or {n: p.detach().cpu().clone() for n, p in pipe.named().items() if mine(n) and not torch.equal(p, before[n])}
            self._check(stage, pipe, others, result)
        except BaseException:
            self._forget()  # who knows what a failed stage left behind
            raise
        record = {"seconds": round(time.monotonic() - started, 3), "losses": run.losses, "torch": torch.__version__}
        self._publish(self.folder(lineage), {**lineage.record(), **record}, weights=result, state=run.state)
        pipe.reset()

    def _resume(self, lineage: Lineage, pipe: Pipe, run: Run) -> None:
        snapshot = self.store.folder("checkpoints", f"{lineage.trajectory}-{run.start}")
        tensors = self._tensors(snapshot)
        run.state = load_file(snapshot / "state.safetensors")
        if hasattr(lineage.stages[-1], "merged"):
            run.adapter = tensors
        else:
            pipe.apply(tensors)

    @staticmethod
    def _check(stage: Stage, pipe: Pipe, others: Mapping[str, int], result: Mapping[str, Tensor]) -> None:
        moved = [name for name, p in pipe.named().items() if name in others and _print(p) != others[name]]
        if moved:
            raise StoreError(f"{type(stage).__module__} says it trains '{stage.trains}' but it changed '{moved[0]}' too; correct its `trains`")
        if broken := [name for name, tensor in result.items() if not torch.isfinite(tensor).all()]:
            raise PreconditionError(f"{type(stage).__module__} made '{broken[0]}' infinite or NaN; try a smaller learning rate")

    def _reporter(self, lineage: Lineage) -> Callable[[int, int, float], None]:
        name = type(lineage.stages[-1]).__module__.rpartition(".")[2]

        def report(step: int, steps: int, loss: float) -> None:
            if step % 50 == 0 or step == steps:
                self.progress(f"{name}: step {step}/{steps}, loss {loss:.4f}")

        return report

    def _hit(self, folder: Path) -> bool:
        """Whether the store has it; what was there before this process asked first is a cache hit."""
        found = self.store.has(folder)
        self.counts["cache_hits"] += found and folder not in self._asked
        self._asked.add(folder)
        return found

    # --- images and scores ---------------------------------------------------------------------------------------

    def images(self, lineage: Lineage, wanted: Wanted) -> Path:
        """Folder of the images that `lineage` draws; `images.safetensors` holds uint8 (n, 3, H, W)."""
        folder = self._image_folder(lineage, wanted)
        if self._hit(folder):
            return folder
        with self.store.lease(folder.name):
            if not self.store.has(folder):
                chosen, sampler = wanted
                images = sampling.draw(self.load(lineage), chosen.prompts, chosen.seeds, sampler)
                self.counts["images"] += len(images)
                record = {"lineage": lineage.key, "prompts": chosen.prompts, "seeds": chosen.seeds}
                self._publish(folder, record, images={"images": images})
        return folder

    def _image_folder(self, lineage: Lineage, wanted: Wanted) -> Path:
        return self.store.folder("images", key([lineage.key, *wanted]))

    def read_images(self, folder: Path) -> Tensor:
        """uint8 (n, 3, H, W) from a folder that `images` gave."""
        return self._tensors(folder, "images.safetensors")["images"]

    def scores(self, lineage: Lineage, wanted: Wanted, detector: Any) -> Tensor:
        """What the detector sees in those images: probabilities (n, classes)."""
        images = self.images(lineage, wanted)

        def look() -> Tensor:
            scores: Tensor = detector(self.read_images(images).float() / 255).cpu()
            if not torch.isfinite(scores).all():
                raise PreconditionError(f"detector {detector.address} gave scores that are not finite")
            return scores

        return self.kept("scores", {"images": images.name, "detector": detector.address}, look)

    def kept(self, kind: str, what: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
        """A tensor that is made once: `what` is its address and its record."""
        folder = self.store.folder(kind, key(what))
        if not self._hit(folder):
            self._publish(folder, what, **{kind: {kind: make()}})
        return self._tensors(folder, f"{kind}.safetensors")[kind]

    def pictures(self, lineage: Lineage, wanted: Wanted, count: int) -> tuple[str, ...]:
        """Paths of the first `count` images as PNG files, for people to look at."""
        source = self.images(lineage, wanted)
        folder = self.store.folder("pictures", f"{source.name}-{count}")

        def write(draft: Path) -> Mapping[str, Any]:
            for i, image in enumerate(self.read_images(source)[:count]):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(draft / f"{i:03d}.png")
            return {"images": source.name}

        if not self.store.has(folder):
            self.store.publish(folder, write)
        return tuple(str(path) for path in sorted(folder.glob("*.png")))

    def _publish(self, folder: Path, record: Mapping[str, Any], **files: Mapping[str, Tensor]) -> None:
        """An artefact of one safetensors file per keyword."""

        def write(draft: Path) -> Mapping[str, Any]:
            for name, tensors in files.items():
                try:
                    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, draft / f"{name}.safetensors")
                except SafetensorError as error:  # this is how it says that the disk is full
                    raise OSError(str(error)) from error
            return record

        self.store.publish(folder, write)

    # --- working together ----------------------------------------------------------------------------------------

    def build(self, lineages: Iterable[Lineage], pictures: Iterable[tuple[Lineage, Wanted]] = ()) -> dict[str, ResurgenceError]:
        """Make all these checkpoints and images, sharing the work with other processes on the same store.

        Takes whatever is missing and not being made by another; waits only when nothing else is left to do.
        Returns the error of each lineage that could not be made, by its key; the others are there.
        """
        lineages = list(lineages)
        jobs = self._jobs(lineages, pictures)
        failures: dict[Path, ResurgenceError] = {}
        while open_jobs := [j for j in jobs if j.folder not in failures and not self.store.has(j.folder)]:
            for job in open_jobs:
                if blocker := next((failures[need] for need in job.needs if need in failures), None):
                    failures[job.folder] = blocker
                elif all(self.store.has(need) for need in job.needs) and self._take(job, failures):
                    break
            else:
                time.sleep(0.2)
        return {lineage.key: failures[f] for lineage in lineages if (f := self.folder(lineage)) in failures}

    def _take(self, job: Job, failures: dict[Path, ResurgenceError]) -> bool:
        """Do a job unless another process holds it; says whether it was done."""
        with self.store.lease(job.lease, wait=False) as mine:
            if not mine:
                return False
            try:
                job.make()
            except ResurgenceError as error:
                failures[job.folder] = error
            return True

    def _jobs(self, lineages: Iterable[Lineage], pictures: Iterable[tuple[Lineage, Wanted]]) -> list[Job]:
        jobs: dict[Path, Job] = {}
        for lineage in sorted(lineages, key=lambda each: each.steps):
            for depth in range(1, len(lineage.stages) + 1):
                part = Lineage(lineage.base, lineage.task, lineage.stages[:depth])
                needs = [self.folder(part.parent)] if depth > 1 else []
                for _, wanted in self._needed(part):
                    root, folder = self._root(part), self._image_folder(self._root(part), wanted)
                    needs.append(folder)
                    jobs.setdefault(folder, Job(folder, folder.name, (), lambda r=root, w=wanted: self.images(r, w)))  # type: ignore[misc]
                jobs.setdefault(self.folder(part), Job(self.folder(part), part.trajectory, tuple(needs), lambda p=part: self.checkpoint(p)))  # type: ignore[misc]
        for lineage, wanted in pictures:
            folder = self._image_folder(lineage, wanted)
            before = (self.folder(lineage),) if lineage.stages else ()
            jobs.setdefault(folder, Job(folder, folder.name, before, lambda each=lineage, w=wanted: self.images(each, w)))  # type: ignore[misc]
        return list(jobs.values())


def _print(tensor: Tensor) -> int:
    """A fingerprint of a float32 tensor's bits: their sum weighted by place, modulo 2^64, so that changes do not cancel."""
    bits = tensor.detach().contiguous().flatten().view(torch.int32).long()
    return int((bits * (torch.arange(1, len(bits) + 1, device=bits.device) * 6364136223846793005)).sum())
