"""Run lineages: checkpoint -> images -> scores, each made once and kept in the store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import execution, jobs, sampling
from harness.errors import PreconditionError, ResurgenceError
from harness.execution import Memory, Snapshot
from harness.jobs import Job, Wanted
from harness.pipeline import Pipe
from harness.spec import Lineage, key
from harness.store import Store

__all__ = ["Engine", "Wanted"]
Progress = Callable[[str], None]


class Engine:
    """Makes and reads artefacts with one model in memory. `counts` says what it cost: images and cache hits."""

    def __init__(self, store: Store, progress: Progress = lambda line: None) -> None:
        self.store = store
        self.progress = progress
        self.counts: Counter[str] = Counter()
        self._memory = Memory()
        self._asked: set[Path] = set()

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def folder(self, lineage: Lineage) -> Path:
        """Where a lineage's checkpoint is or will be; snapshots of one trajectory are siblings."""
        return self.store.folder(*Job(lineage).place)

    def checkpoint(self, lineage: Lineage) -> Path:
        """Make sure that the weights of `lineage` are in the store."""
        folder = self.folder(lineage)
        if not lineage.stages:
            return folder
        if self._hit(folder):
            return folder
        self.checkpoint(lineage.parent)
        sets = {name: self.images(jobs.root(lineage), chosen) for name, chosen in jobs.needed(lineage)}
        with self.store.lease(lineage.trajectory):
            if not self.store.has(folder):
                self._run_last_stage(lineage, {name: self.read_images(path) for name, path in sets.items()})
        return folder

    def load(self, lineage: Lineage) -> Pipe:
        """The model with the weights of `lineage`; the one it held before is gone."""
        if lineage.stages:
            self.checkpoint(lineage)
        return self._memory.load(lineage, lambda part: self._tensors(self.folder(part)))

    def cost(self) -> dict[str, int]:
        """What this process has done so far."""
        return {"unet_passes": self._memory.passes, "images": self.counts["images"], "cache_hits": self.counts["cache_hits"]}

    def _tensors(self, folder: Path, file: str = "weights.safetensors") -> dict[str, Tensor]:
        self.store.read(folder)
        return load_file(folder / file)

    def _snapshot(self, lineage: Lineage) -> int:
        """Steps of the longest shorter snapshot of the same trajectory, 0 if there is none."""
        found = [int(address.rpartition("-")[2]) for address in self.store.addresses(jobs.CHECKPOINTS, f"{lineage.trajectory}-")]
        return max((steps for steps in found if 0 < steps < lineage.steps), default=0)

    def _run_last_stage(self, lineage: Lineage, images: Mapping[str, Tensor]) -> None:
        """Train the last stage of `lineage` on top of its parent and publish what changed."""
        stage, started = lineage.stages[-1], time.monotonic()
        pipe = self.load(lineage.parent)
        self._memory.edited()
        earlier = self._earlier(lineage, self._snapshot(lineage))
        try:
            result, run = execution.execute(pipe, stage, lineage.task.view(stage.reads), images, earlier, self._reporter(lineage))
        except BaseException:
            self._memory.forget()  # who knows what a failed stage left behind
            raise
        record = {"seconds": round(time.monotonic() - started, 3), "losses": run.losses, "torch": torch.__version__}
        self._publish(self.folder(lineage), {**lineage.record(), **record}, weights=result, state=run.state)
        pipe.reset()

    def _earlier(self, lineage: Lineage, steps: int) -> Snapshot | None:
        """The trajectory's snapshot after so many steps; None after none."""
        folder = self.store.folder("checkpoints", f"{lineage.trajectory}-{steps}")
        return Snapshot(steps, self._tensors(folder), load_file(folder / "state.safetensors")) if steps else None

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
        folder = self.store.folder(*Job(lineage, wanted).place)
        if self._hit(folder):
            return folder
        with self.store.lease(folder.name):
            if not self.store.has(folder):
                chosen, sampler = wanted
                pipe = self.load(lineage)
                images = sampling.draw(pipe, chosen.prompts, chosen.seeds, sampler)
                self.counts["images"] += len(images)
                record = {"lineage": lineage.key, "prompts": chosen.prompts, "seeds": chosen.seeds}
                record |= {"cut": cut} if (cut := pipe.overlong(chosen.prompts)) else {}
                self._publish(folder, record, images={"images": images})
                if cut:
                    self.progress(self.cut(lineage, wanted))
        return folder

    def cut(self, lineage: Lineage, *wanted: Wanted) -> str:
        """How many prompts of these images the model read the start of and no more, in words; nothing where it read them all."""
        records = [self.store.record(self.images(lineage, each)) for each in wanted]
        cut, every = ({prompt for record in records for prompt in record.get(part, ())} for part in ("cut", "prompts"))
        return f"{len(cut)} of {len(every)} prompts are longer than the model reads and were cut" if cut else ""

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
        self.store.read(folder)
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

        Returns the error of each lineage that could not be made, by its key; the others are there.
        """
        lineages = list(lineages)
        failures = jobs.build(self, jobs.ordered(lineages, pictures))
        return {lineage.key: failures[f] for lineage in lineages if (f := self.folder(lineage)) in failures}

    def make(self, job: Job) -> Path:
        """Make sure that one job's artefact, and all that it needs, is in the store."""
        return self.checkpoint(job.lineage) if job.wanted is None else self.images(job.lineage, job.wanted)
