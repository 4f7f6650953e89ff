"""How good a model's images of what must survive still are, beside the base model's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from harness.engine import Engine, Wanted
from harness.errors import unknown
from harness.measurement import round_images, rounds_ahead
from harness.quality._figure import Figure
from harness.quality.features import BACKBONES
from harness.quality.fidelity import fidelity
from harness.spec import Lineage, Quality, Task, sha256

REFERENCE = 1  # of the noise that the base model draws the reference from; rates are measured at 0
VERSION = 2  # bump when figures change
SAYS = "the base model's for the same prompts, other noise"


def wanted(task: Task, asked: Quality) -> tuple[list[Wanted], list[Wanted]]:
    """The images to judge and the reference. The first to be judged are those that the rate of the retained concepts has drawn anyway."""
    width = len(task.retained.concepts) * len(task.retained.prompts)
    rounds, first = asked.count // width, rounds_ahead(0, task.tolerance.floor, width)
    parts = [part for part in (range(min(first, rounds)), range(first, rounds)) if part]
    return [(round_images(task.retained, part, 0), task.sampler) for part in parts], [(round_images(task.retained, range(rounds), REFERENCE), task.sampler)]


def figures(engine: Engine, lineage: Lineage, asked: Quality) -> Iterator[Figure]:
    """FID and sFID of the images of `lineage`, each with its conditions and its jackknife error, computed once."""
    mine, reference = wanted(lineage.task, asked)
    if asked.backbone not in BACKBONES:
        raise unknown("backbone in [quality]", asked.backbone, BACKBONES)
    backbone, base, weights = BACKBONES[asked.backbone], Lineage(lineage.base, lineage.task), Path(asked.weights) if asked.weights else None
    places = [[engine.images(whose, each).name for each in sets] for whose, sets in ((lineage, mine), (base, reference))]

    def look() -> Tensor:
        seen, other = (_drawn(engine, whose, sets) for whose, sets in ((lineage, mine), (base, reference)))
        found = fidelity(seen, other, SAYS, backbone, weights)[:2]
        return torch.tensor([[each.value, each.spread or 0.0, each.size] for each in found], dtype=torch.float64)

    file = weights / "model.safetensors" if weights else None
    digest = sha256(file) if file and file.is_file() else ""  # where it is missing, looking says what to fetch
    what = {"figures": "FID, sFID", "of": places[0], "reference": places[1], "backbone": backbone.says, "weights": digest, "version": VERSION}
    table = engine.kept("quality", what, look)
    for name, layer, (value, spread, size) in zip(("FID", "sFID"), (backbone.layer, backbone.spatial), table.tolist(), strict=True):
        conditions = (f"{backbone.says}, layer {layer}", int(size), f"{asked.count} images: {SAYS}", asked.count, backbone.resize)
        yield Figure(name, value, *conditions, spread)


def _drawn(engine: Engine, lineage: Lineage, sets: list[Wanted]) -> Tensor:
    return torch.cat([engine.read_images(engine.images(lineage, each)) for each in sets])
