"""What a piece of work will cost, told from its description and the model's shapes: no model is loaded.

UNet passes and images are counted. Minutes, disk and memory are **estimates** by the figures stated here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

from harness import catalogue, footprint
from harness.footprint import FLOAT
from harness.groups import group
from harness.jobs import Job
from harness.spec import Base, Lineage, Sampler

PARAMETERS, POSITIONS = 860e6, 64 * 64  # of SD 1.x's UNet and its latents
LEARNING = 3  # a pass that learns, forward and backward, in forward passes; 2.4 (cross-attention) to 3.2 (all) on the pocket model


@dataclass(frozen=True)
class Pace:
    """Seconds of one image through SD 1.x's UNet in float32; other models in proportion to parameters times positions, but no pass takes less than `least`."""

    device: str
    seconds: float
    least: float


GPU = Pace("a recent data-centre GPU", 0.03, 0.0005)  # assumed, not measured; the least is what starting its kernels takes
CPU = Pace("one CPU thread", 25.0, 0.0045)  # the least is the pocket model's, measured (`python -m harness bench --only cold`); the rest assumed


def pace() -> Pace:
    """What work takes here."""
    import torch

    return GPU if torch.cuda.is_available() else CPU


@dataclass(frozen=True)
class Size:
    """A model from outside: its tensors' shapes by full name, the sides of its latents, and of its images in pixels."""

    shapes: Mapping[str, tuple[int, ...]]
    latent: tuple[int, int]
    image: tuple[int, int]

    @property
    def seconds(self) -> float:
        """Estimated for one UNet pass."""
        unet = sum(prod(shape) for name, shape in self.shapes.items() if name.startswith("unet."))
        here = pace()
        return max(here.least, here.seconds * unet / PARAMETERS * prod(self.latent) / POSITIONS)

    def parameters(self, trains: str) -> int:
        """How many a group holds."""
        mine = group(trains)
        return sum(prod(shape) for name, shape in self.shapes.items() if mine(name))


@cache
def size(base: Base) -> Size | None:
    """A model's size by the headers of its parts' files, or by a single file's configuration; None where neither is here in the usual layout."""
    from harness import pipeline, single_file  # they import torch

    file = Path(base.source)
    try:
        if (folder := single_file.settings(file) if file.is_file() else _folder(base.source)) is None:
            return None
        kind = pipeline.kind_of(folder)
        if file.is_file() and issubclass(kind, pipeline.StableDiffusion):
            shapes = single_file.shapes(folder, kind.encoders)
        else:
            shapes = dict(_shapes(folder, kind.components))
            if not any(name.startswith("unet.") for name in shapes):  # weights in another format, or not here
                return None
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        vae = folder / "vae" / "config.json"
        scale = 2 ** (len(json.loads(vae.read_text(encoding="utf-8"))["block_out_channels"]) - 1) if vae.is_file() else 1
        sides = unet["sample_size"]
        height, width = (sides, sides) if isinstance(sides, int) else sides
        return Size(shapes, (height, width), (height * scale, width * scale))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folder(source: str) -> Path | None:
    """The model's folder: shipped, given, or in the hub's local cache."""
    from harness.pipeline import SHIPPED

    folder = SHIPPED.get(source, Path(source))
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download

        name, _, revision = source.partition("@")
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):  # what the hub raises is among these
        return None


def _shapes(folder: Path, components: Iterable[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Full name and shape of every tensor of the parts that are loaded: a safety checker, for one, is not."""
    for path in sorted(path for part in components for path in (folder / part).glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from ((f"{path.parent.name}.{name}", tuple(each["shape"])) for name, each in header.items() if name != "__metadata__")


@dataclass(frozen=True)
class Cost:
    """UNet passes that learn and that only look, images drawn, and estimates of seconds, disk and memory in bytes."""

    learning: int = 0
    looking: int = 0
    images: int = 0
    seconds: float = 0.0
    disk: int = 0
    memory: int = 0

    @property
    def passes(self) -> int:
        """All of them."""
        return self.learning + self.looking

    def __add__(self, other: Cost) -> Cost:
        """One after the other: the memory is the larger one's."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("learning", "looking", "images", "seconds", "disk")}
        return Cost(**sums, memory=max(self.memory, other.memory))


def sampling(count: int, sampler: Sampler) -> int:
    """UNet passes of so many images: under guidance each step takes two."""
    return count * sampler.steps * (1 if sampler.guidance == 1 else 2)


def cost(job: Job, start: int = 0) -> Cost:
    """What a job costs once all that it needs is there; a stage of `steps` goes on from a snapshot at `start`."""
    found = size(job.lineage.base)
    seconds = found.seconds if found else 0.0
    weights = FLOAT * found.parameters("all") if found else 0
    if job.wanted is not None:
        chosen, sampler = job.wanted
        count = len(chosen.prompts)
        passes = sampling(count, sampler)
        pixels = 3 * prod(found.image) if found else 0
        return Cost(looking=passes, images=count, seconds=passes * seconds, disk=count * pixels, memory=weights)
    passes = learning(job.lineage, start)
    stage, shapes = job.lineage.stages[-1], found.shapes if found else {}
    kept = 3 * footprint.learning(stage, shapes) or footprint.count(shapes, footprint.moved(stage, shapes))  # with Adam's two moments
    memory = footprint.peak(job.lineage, shapes, found.latent) if found else 0
    return Cost(learning=passes, seconds=LEARNING * passes * seconds, disk=FLOAT * kept, memory=memory)


def learning(lineage: Lineage, start: int = 0) -> int:
    """UNet passes of the last stage of `lineage`, from a snapshot at `start` on."""
    stage = lineage.stages[-1]
    return catalogue.passes(stage, lineage.task.view(stage.reads), lineage.steps - start)
