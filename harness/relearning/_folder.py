"""Pictures that somebody brings: a folder with one sub-folder per concept, named as the concept."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from harness import pocket
from harness.errors import SpecError, StoreError
from harness.spec import Group, key, sha256
from harness.taskfile import PICTURES, pictures_in


def find(source: str) -> Path:
    """The folder behind `pocket` or a path."""
    folder = pocket.RENDERS if source == "pocket" else Path(source)
    if not folder.is_dir():
        raise SpecError(f"no pictures at '{source}'; give 'base', 'pocket', or a folder with one sub-folder of pictures per erased concept")
    return folder


@cache
def digest(source: str) -> str:
    """Digest of the pictures' names and bytes."""
    folder = find(source)
    found = [[path.relative_to(folder).as_posix(), sha256(path)] for path in pictures_in(folder)]
    if not found:
        raise SpecError(f"'{source}' holds no pictures ({', '.join(PICTURES)}) in sub-folders named as the concepts")
    return key(found)


def read(source: str, asked: Group, count: int, size: int) -> tuple[Tensor, tuple[str, ...]]:
    """The first `count` pictures of each concept, uint8 (n, 3, size, size), and their captions: the prompts in turn."""
    folder, images, captions = find(source), [], []
    for concept in asked.concepts:
        found = [picture for path in pictures_in(folder / concept) for picture in _frames(path, size)][:count]
        if len(found) < count:
            raise SpecError(f"'{source}' holds {len(found)} pictures of '{concept}', the attack asks for {count}; add some or lower images_per_concept")
        prompts = asked.asking(concept)
        images += found
        captions += [prompts[i % len(prompts)] for i in range(count)]
    return torch.stack(images), tuple(captions)


def _frames(path: Path, size: int) -> list[Tensor]:
    """Every picture in a file, uint8 (3, size, size): one, or many in a file of several pages."""
    try:
        with Image.open(path) as file:
            squares = [frame.convert("RGB").resize((size, size), Image.Resampling.LANCZOS) for frame in ImageSequence.Iterator(file)]
    except (UnidentifiedImageError, OSError) as error:
        raise StoreError(f"'{path}' is not a readable picture: {error}") from error
    return [torch.from_numpy(np.array(square)).permute(2, 0, 1) for square in squares]
