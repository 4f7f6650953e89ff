"""Prompts and seeds to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harness.pipeline import Pipe, denoise
from harness.spec import Sampler


def noise(pipe: Pipe, seeds: Sequence[int]) -> Tensor:
    """Initial noise (n, c, h, w), one CPU generator per image: it does not depend on batch or device."""
    draws = [torch.randn(pipe.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).to(pipe.device)


@torch.no_grad()
def draw(
    pipe: Pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    batch: int = 50,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """uint8 images (n, 3, H, W), one per prompt and seed."""
    images = []
    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        x_T = noise(pipe, seeds[start : start + batch])
        cond, uncond = pipe.encode(chosen), pipe.encode([""] * len(chosen))
        x_0, _ = denoise(pipe, x_T, cond, uncond, sampler)
        images.append(pipe.decode(x_0))
        report(start + len(chosen), len(prompts))
    return torch.cat(images)
