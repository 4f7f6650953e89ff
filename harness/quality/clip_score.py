"""CLIP score: does the image show what its caption says?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from harness.detection._clip import Clip
from harness.errors import SpecError
from harness.quality._figure import Figure


def clip_score(images: Tensor | Iterable[Tensor], captions: Sequence[str], clip: Clip, batch: int = 64) -> Figure:
    """Mean of 100 times the cosine between each uint8 image (n, 3, h, w), given at once or set by set, and its own caption; never clamped.

    Published figures use ViT-B/32 (AdvUnlearn, MACE) or ViT-L/14; they cannot be compared with each other.
    """
    sets = [images] if isinstance(images, Tensor) else images
    seen = torch.cat([clip.images(part.float() / 255, batch) for each in sets for part in each.split(batch)])
    if len(seen) != len(captions) or not captions:
        raise SpecError(f"a CLIP score needs one caption for each image, got {len(captions)} for {len(seen)}")
    value = 100 * float((seen * clip.texts(captions, batch)).sum(1).mean())
    return Figure(
        "CLIP score (100 x cosine)", value, clip.name, clip.width, "each image's own caption", len(seen), f"bicubic with antialiasing to {clip.size} px"
    )
