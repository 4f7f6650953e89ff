"""Tiny random pipelines of the true classes, as a user's folder would hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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


# --- the layouts of the real ones, each part as theirs but for its size -----------------------------------------------

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _open_clip_tokenizer(context: int = 16) -> CLIPTokenizer:
    """Pads with "!", as the tokenizers of SD 2.x and of SDXL's second encoder do."""
    words = ["!", "<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=context, pad_token="!")


def _text(width: int, vocabulary: int = 54, **changes: Any) -> CLIPTextConfig:
    start = {"bos_token_id": vocabulary - 54, "eos_token_id": vocabulary - 53}
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    return CLIPTextConfig(vocab_size=vocabulary, **start, **shape, **changes)


def _vae(**changes: Any) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(block_out_channels=(4, 4, 8), **blocks, norm_num_groups=4, latent_channels=4, sample_size=32, **changes)


def _unet(width: int, **changes: Any) -> UNet2DConditionModel:
    shape = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": width}
    crossing = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    return UNet2DConditionModel(**shape, **{**crossing, **changes})


def sd14() -> StableDiffusionPipeline:
    """SD 1.4: four levels, convolutions around attention, PNDM's scheduler."""
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True)
    return StableDiffusionPipeline(
        _vae(), CLIPTextModel(_text(16)), tokenizer(), _unet(16, attention_head_dim=4), scheduler, None, None, requires_safety_checker=False
    )


def sd21() -> StableDiffusionPipeline:
    """SD 2.1: v-prediction, linear projections, heads by level, OpenCLIP's text encoder with its own activation and padding."""
    unet = _unet(24, attention_head_dim=(1, 1, 2, 2), use_linear_projection=True, upcast_attention=True)
    text = CLIPTextModel(_text(24, 55, hidden_act="gelu", projection_dim=12))
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    return StableDiffusionPipeline(_vae(), text, _open_clip_tokenizer(), unet, scheduler, None, None, requires_safety_checker=False)


def sdxl() -> StableDiffusionXLPipeline:
    """SDXL: three levels, two text encoders side by side, the second one's pooled vector and six sizes as added conditions."""
    unet = _unet(
        40,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )
    one, two = CLIPTextModel(_text(16)), CLIPTextModelWithProjection(_text(24, 55, hidden_act="gelu", projection_dim=12))
    vae = _vae(scaling_factor=0.13025, force_upcast=True)
    return StableDiffusionXLPipeline(vae, one, two, tokenizer(), _open_clip_tokenizer(), unet, EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"))


LAYOUTS: dict[str, Callable[[], Any]] = {"sd14": sd14, "sd21": sd21, "sdxl": sdxl}


def of_layout(name: str, seed: int = 0) -> Any:
    """A random pipeline of a real one's layout: 32 px images, 4x8x8 latents."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LAYOUTS[name]()


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
