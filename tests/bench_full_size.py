"""Seconds and peak memory of a stage at the full size of Stable Diffusion 1.4, beside the plan's estimate.

    python -m tests.bench_full_size [uce] [esd] [lora]

The UNet has SD 1.4's own configuration, 860 M parameters, and random weights; the text encoder and the autoencoder are small, but of its
widths (77 positions of 768, latents 4x64x64). Each case runs in a process of its own, as the engine runs it, at batch 1; those that
learn take two steps, since the first one's forward pass comes before Adam has moments. The memory is the process's largest, less
what its libraries take, with a C library that gives back what is freed: left to itself glibc keeps up to a third more than
what is in use (lora 6.73 GB, esd 6.23). What sampling adds to time is left out.

On two slow threads: uce 3.67 GB, planned 3.53 (.96); esd 5.62 GB, planned 5.84 (1.04); lora 5.19 GB, planned 5.32 (1.03).
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import peft  # noqa: F401  # what LoRA would load later counts among the libraries
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from harness import execution, footprint
from harness.finetuning import lora
from harness.pipeline import Pipe, StableDiffusion
from harness.spec import Base, Lineage
from harness.unlearning import esd, uce
from tests import tiny

SD14 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes; glibc reads them as a process starts
STAGES: dict[str, Callable[[], object]] = {
    "uce": uce.Method,
    "esd": lambda: esd.Method(trains="x", steps=2, batch=1, sampler_steps=1),  # no step of sampling before: the same memory, less time
    "lora": lambda: lora.Finetune(steps=2, batch=1, images_per_prompt=1),
}


def peak() -> float:
    """The largest memory this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def model() -> Pipe:
    """SD 1.4's UNet with small companions."""
    shape = {"hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 77}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=54, bos_token_id=0, eos_token_id=1, **shape))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(4, 4, 4, 8), **blocks, norm_num_groups=4, latent_channels=4, sample_size=512)
    scheduler = DDIMScheduler(**tiny.SCHEDULE, clip_sample=False)
    unet = UNet2DConditionModel(**SD14)
    sd = StableDiffusionPipeline(vae, text, tiny.tokenizer(77), unet, scheduler, None, None, requires_safety_checker=False)
    return StableDiffusion(sd, torch.device("cpu"))


def step(name: str) -> dict[str, float]:
    """A stage's seconds, GB at its peak and as planned, and what it moved."""
    torch.manual_seed(0)
    libraries = peak()
    stage, pipe, task = STAGES[name](), model(), tiny.task()
    shapes = {each: tuple(p.shape) for each, p in pipe.named().items()}
    images = {key: torch.randint(256, (len(wanted.prompts), 3, 512, 512)).to(torch.uint8) for key, wanted in stage.images(task).items()}
    start = time.perf_counter()
    changed, _ = execution.execute(pipe, stage, task, images)
    seconds, found = time.perf_counter() - start, peak() - libraries
    planned = footprint.peak(Lineage(Base("", ""), task, (stage,)), shapes, pipe.latent_shape[1:]) / 1e9
    parameters = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
    figures = {"M parameters": parameters, "GB libraries": libraries, "GB peak": found, "GB planned": planned, "planned / peak": planned / found}
    return {**figures, "seconds": seconds, "passes": pipe.passes, "tensors changed": len(changed)}


def main(names: list[str]) -> None:
    """Print a line a case."""
    os.environ.update(GIVE_BACK)
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(step, name).result()
        print(f"{name:5}: " + ", ".join(f"{what} {value:.2f}" for what, value in found.items()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(STAGES))
