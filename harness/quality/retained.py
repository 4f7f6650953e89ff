"""How good a model's images of what must survive still are, beside the base model's own or real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.engine import Engine, Wanted
from harness.errors import unknown
from harness.measurement import round_images, rounds_ahead
from harness.quality._figure import Figure
from harness.quality.features import BACKBONES
from harness.quality.fidelity import CUT, fidelity
from harness.spec import Lineage, Quality, Task, key, sha256
from harness.taskfile import real_images

REFERENCE = 1  # of the noise that the base model draws the reference from; rates are measured at 0
VERSION = 2  # bump when figures change
SAYS = "the base model's for the same prompts, other noise"


def wanted(task: Task, asked: Quality) -> tuple[list[Wanted], list[Wanted]]:
    """The images to judge and the reference. The first to be judged are those that the rate of the retained concepts has drawn anyway."""
    width = len(task.retained.concepts) * len(task.retained.prompts)
    rounds, first = asked.count // width, rounds_ahead(0, task.tolerance.floor, width)
    parts = [part for part in (range(min(first, rounds)), range(first, rounds)) if part]
    return [(round_images(task.retained, part, 0), task.sampler) for part in parts], [(round_images(task.retained, range(rounds), REFERENCE), task.sampler)]


@dataclass(frozen=True)
class Reference:
    """What images are held against: its address, what a figure says of it, and how it is looked at."""

    address: list[str] | str
    says: str
    count: int
    cut: str
    look: Callable[[], Tensor | list[Path]]


def reference(engine: Engine, lineage: Lineage, asked: Quality) -> Reference:
    """The task's real images, whose content is their address wherever they lie; else what the base model draws from other noise."""
    if files := real_images(lineage.task, asked):
        digest = key(sorted(sha256(file) for file in files))
        return Reference(digest, f"real ones in '{asked.reference}', content {digest[:12]}", len(files), CUT, lambda: files)
    base, sets = Lineage(lineage.base, lineage.task), wanted(lineage.task, asked)[1]
    return Reference([engine.images(base, each).name for each in sets], SAYS, asked.count, "", lambda: _drawn(engine, base, sets))


def figures(engine: Engine, lineage: Lineage, asked: Quality) -> Iterator[Figure]:
    """FID and sFID of the images of `lineage`, each with its conditions and its jackknife error, computed once."""
    if asked.backbone not in BACKBONES:
        raise unknown("backbone in [quality]", asked.backbone, BACKBONES)
    backbone, weights, mine = BACKBONES[asked.backbone], Path(asked.weights) if asked.weights else None, wanted(lineage.task, asked)[0]
    against = reference(engine, lineage, asked)
    places = [engine.images(lineage, each).name for each in mine]

    def look() -> Tensor:
        found = fidelity(_drawn(engine, lineage, mine), against.look(), against.says, backbone, weights)[:2]
        return torch.tensor([[each.value, each.spread or 0.0, each.size] for each in found], dtype=torch.float64)

    file = weights / "model.safetensors" if weights else None
    digest = sha256(file) if file and file.is_file() else ""  # where it is missing, looking says what to fetch
    what = {"figures": "FID, sFID", "of": places, "reference": against.address, "backbone": backbone.says, "weights": digest, "version": VERSION}
    table = engine.kept("quality", what, look)
    for name, layer, (value, spread, size) in zip(("FID", "sFID"), (backbone.layer, backbone.spatial), table.tolist(), strict=True):
        conditions = (f"{backbone.says}, layer {layer}", int(size), f"{against.count} images: {against.says}", asked.count, against.cut + backbone.resize)
        yield Figure(name, value, *conditions, spread)


def _drawn(engine: Engine, lineage: Lineage, sets: list[Wanted]) -> Tensor:
    return torch.cat([engine.read_images(engine.images(lineage, each)) for each in sets])
