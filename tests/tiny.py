"""Tiny random pipelines of the true classes, as a user's folder would hold them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from harness.spec import Group, Sampler, Task

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer(context: int = 16) -> CLIPTokenizer:
    """Letters only: every word becomes its letters."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=context)


def pipeline(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A random Stable Diffusion pipeline: 16 px images, 4x4x4 latents, 8 cross-attention layers' worth of structure."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = CLIPTextConfig(
            vocab_size=54,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
        )
        unet = UNet2DConditionModel(
            sample_size=4,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        )
        text = CLIPTextModel(clip)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type, steps_offset=1)
    return StableDiffusionPipeline(vae, text, tokenizer(), unet, scheduler, None, None, requires_safety_checker=False)


def save(folder: Path, dtype: torch.dtype = torch.float32, variant: str | None = None, **kind: str) -> Path:
    """A pipeline folder on disk."""
    pipeline(**kind).to(dtype).save_pretrained(folder, variant=variant)
    return folder


def task() -> Task:
    """A task of one-letter people."""
    prompts = ("a {}", "the {}")
    return Task(
        id="tiny",
        suite="celebrity",
        source="made up",
        erased=Group(("x", "y"), prompts),
        anchor=Group(("p",), prompts),
        retain=Group(("k", "l"), prompts),
        finetune={"in": Group(("f", "g"), prompts), "out": Group(("o",), prompts)},
        retained=Group(("r", "s"), prompts),
        sampler=Sampler(steps=2, guidance=3.0),
        detector={"name": "classifier"},
        control="esd",
    )
