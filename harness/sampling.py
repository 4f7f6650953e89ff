"""Prompts and seeds to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harness.devices import DTYPE
from harness.errors import PreconditionError
from harness.pipeline import Pipe, denoise
from harness.spec import Sampler

MOST = 50  # images drawn at once where memory is plenty
PLACES = MOST * 32 * 32  # of all latents at once on the CPU: 50 of 32 x 32, 12 of SD 1.4, 3 of SDXL
SHARE = 0.8  # of the free memory of a GPU


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
    batch: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """uint8 images (n, 3, H, W), one per prompt and seed; `batch` at once, or as many as fit.

    Where that was too many after all, half of them, and so on; the images that are there stay. An image depends on its prompt and seed alone,
    and of a prompt longer than the model reads on its start (`pipe.overlong`).
    """
    images: list[Tensor] = []
    size, done = batch or pipe.at_once or fitting(pipe), 0
    while done < len(prompts):
        here = slice(done, done + size)
        try:
            images.append(_drawn(pipe, prompts[here], seeds[here], sampler))
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise PreconditionError(f"not even one image of this model fits into memory ({error}); try {DTYPE}=bfloat16, or a larger device") from error
            size = min(size, len(prompts) - done) // 2 or 1
            if batch is None:
                pipe.at_once = size
        else:
            done += len(images[-1])
            report(done, len(prompts))
            continue
        if pipe.device.type == "cuda":  # not within the handler, where the error still holds what was allocated
            torch.cuda.empty_cache()
    return torch.cat(images)


def _drawn(pipe: Pipe, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler) -> Tensor:
    cond, uncond = pipe.encode(prompts, cut=True), pipe.encode([""] * len(prompts))
    x_0, _ = denoise(pipe, noise(pipe, seeds), cond, uncond, sampler)
    return pipe.decode(x_0)


def fitting(pipe: Pipe) -> int:
    """How many images to draw at once: on a GPU what a pass of one image under guidance says, elsewhere by the size of the latents."""
    _, height, width = pipe.latent_shape
    if pipe.device.type != "cuda":
        return max(1, min(MOST, PLACES // (height * width)))
    passes, each = pipe.passes, _peak(pipe)
    pipe.passes = passes  # the probe is not of what was asked
    free, _ = torch.cuda.mem_get_info(pipe.device)
    pipe.at_once = max(1, min(MOST, int(SHARE * free / max(each, 1))))
    return pipe.at_once


def _peak(pipe: Pipe) -> int:
    """Bytes that one image needs for a pass under guidance, above what is held anyway."""
    pipe.predict(x := noise(pipe, [0, 0]), t := torch.tensor(1, device=pipe.device), cond := pipe.encode(["", ""]))  # what is set up once
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(pipe.device)
    before = torch.cuda.memory_allocated(pipe.device)
    pipe.predict(x, t, cond)
    return torch.cuda.max_memory_allocated(pipe.device) - before
