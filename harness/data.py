"""Captioned images as training batches of latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from harness.errors import SpecError
from harness.pipeline import Pipe


class Captioned:
    """Images and what each of them is called. The images are encoded once; every batch samples their posterior."""

    def __init__(self, pipe: Pipe, images: Tensor, captions: Sequence[str]) -> None:
        if len(images) != len(captions) or not captions:
            raise SpecError(f"need one caption per image and at least one, got {len(images)} images and {len(captions)} captions")
        self.mean, self.std = pipe.latents(images)
        self.embeddings = pipe.encode(captions)

    def batch(self, size: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """`size` latents x_0 (size, c, h, w) drawn with replacement, and their text embeddings."""
        chosen = torch.randint(len(self.mean), (size,), generator=rng)
        noise = torch.randn((size, *self.mean.shape[1:]), generator=rng).to(self.mean)
        return self.mean[chosen] + self.std[chosen] * noise, self.embeddings[chosen]
