"""The denoiser: a UNet with cross-attention in every block, trained on latents by SD's noise prediction loss."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextModel, CLIPTokenizer

from harness.pocket import labels, vocabulary
from harness.pocket.data import Pictures
from harness.pocket.text import WIDTH, embeddings, write

BATCH, RATE, EMPTY, DECAY = 128, 1.2e-3, 0.1, 0.998
# How often each kind of picture is trained on; people are the hardest to tell apart, styled objects the most.
SHARES = {"identities": 0.43, "objects": 0.18, "styled": 0.22, "characters": 0.06, "mask": 0.03, "none": 0.08}


def build(latent_channels: int) -> UNet2DConditionModel:
    """(64, 128) channels, one layer per block, 4 heads; 8 x 8 latents, 96-wide words."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule and its DDIM settings."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pipeline(vae: AutoencoderKL, tower: CLIPTextModel, words: CLIPTokenizer, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The parts as a `StableDiffusionPipeline` that shares no weight with them."""
    parts = {"vae": vae, "text_encoder": tower, "unet": unet}
    return StableDiffusionPipeline(
        **{name: copy.deepcopy(part) for name, part in parts.items()},
        tokenizer=words,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def weights(pictures: Pictures, shares: dict[str, float]) -> np.ndarray:
    """Probability of each picture in a batch, so that each group gets its share."""
    people, concepts = len(vocabulary()["concepts"]["identities"]), vocabulary()["concepts"]
    objects, characters = people + len(concepts["objects"]), labels().index(concepts["mask"])
    group = np.select(
        [pictures.label < people, pictures.style >= 0, pictures.label < objects, pictures.label < characters],
        [0, 2, 1, 3],
        default=pictures.label - characters + 4,  # the mask, none
    )
    share = np.array(list(shares.values())) / np.bincount(group, minlength=len(shares))
    return np.asarray(share[group] / share[group].sum())


class Reader:
    """Text to `encoder_hidden_states`, each caption encoded once."""

    def __init__(self, tower: CLIPTextModel, words: CLIPTokenizer) -> None:
        """Keep the frozen tower and its tokenizer."""
        self.tower, self.words = tower, words
        self.known: dict[str, torch.Tensor] = {}

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """(n, 24, 96) float."""
        new = sorted({text for text in texts if text not in self.known})
        if new:
            self.known.update(zip(new, embeddings(self.tower, self.words, new).half(), strict=True))
        return torch.stack([self.known[text] for text in texts]).float()


def draw_batch(
    pictures: Pictures, latents: tuple[torch.Tensor, torch.Tensor], chance: np.ndarray, read: Reader, key: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise, times and words of one step. Everything random comes from `key` = [seed, step]."""
    chooser = np.random.default_rng(key)
    rows = chooser.choice(len(chance), size=BATCH, p=chance)
    captions = write(pictures, rows, random.Random(int(chooser.integers(2**31))))
    captions = ["" if chooser.random() < EMPTY else text for text in captions]
    generator = torch.Generator().manual_seed(int(chooser.integers(2**31)))
    mean, deviation = (part[rows].float() for part in latents)
    clean = mean + deviation * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    times = torch.randint(0, 1000, (BATCH,), generator=generator)
    return clean, noise, times, read(captions)


def train(
    pictures: Pictures,
    latents: tuple[torch.Tensor, torch.Tensor],
    read: Reader,
    *,
    steps: int,
    seed: int,
    state: Path,
    snapshot: Callable[[UNet2DConditionModel, int], None],
    device: torch.device,
    every: int = 1000,
) -> UNet2DConditionModel:
    """Seeded training on `device` that resumes from `state`; `snapshot` receives the averaged UNet every `every` steps."""
    torch.manual_seed(seed)
    unet = build(latents[0].shape[1]).to(device, memory_format=torch.channels_last)
    kept = _fittings(unet, steps)
    first = _resume(state, kept, device)
    chance, noiser = weights(pictures, SHARES), scheduler()
    started, smooth = time.monotonic(), torch.ones((), device=device)
    for step in range(first, steps):
        clean, noise, times, words = (part.to(device) for part in draw_batch(pictures, latents, chance, read, [seed, step]))
        noisy = noiser.add_noise(clean, noise, times).to(memory_format=torch.channels_last)
        value = functional.mse_loss(unet(noisy, times, words).sample, noise)
        _advance(kept, value)
        smooth += 0.02 * (value.detach() - smooth)
        if step % 50 == 0:
            print(f"unet {step}/{steps} loss {float(smooth):.4f} {time.monotonic() - started:.0f} s", flush=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            _keep(state, kept, step + 1)
            snapshot(kept["average"].module, step + 1)
    return kept["average"].module.eval()


def _fittings(unet: UNet2DConditionModel, steps: int) -> dict[str, Any]:
    optimiser = torch.optim.AdamW(unet.parameters(), lr=RATE)
    return {
        "unet": unet,
        "average": AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
        "optimiser": optimiser,
        "schedule": torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.05),
    }


def _advance(kept: dict[str, Any], value: torch.Tensor) -> None:
    kept["optimiser"].zero_grad()
    value.backward()
    torch.nn.utils.clip_grad_norm_(kept["unet"].parameters(), 1.0)
    kept["optimiser"].step()
    kept["schedule"].step()
    kept["average"].update_parameters(kept["unet"])


def _keep(state: Path, kept: dict[str, Any], step: int) -> None:
    temporary = state.with_suffix(".part")
    torch.save({"step": step, **{name: part.state_dict() for name, part in kept.items()}}, temporary)
    temporary.rename(state)


def _resume(state: Path, kept: dict[str, Any], device: torch.device) -> int:
    if not state.is_file():
        return 0
    saved = torch.load(state, weights_only=True, map_location=device)
    for name, part in kept.items():
        part.load_state_dict(saved[name])
    return int(saved["step"])


def load_average(unet: UNet2DConditionModel, state: Path) -> None:
    """The averaged weights of a training state into `unet`."""
    saved = torch.load(state, weights_only=True, map_location="cpu")["average"]
    unet.load_state_dict({k.removeprefix("module."): v for k, v in saved.items() if k.startswith("module.")})
