"""Stable Diffusion 1.x / 2.x: a text encoder names, a UNet denoises latents, an autoencoder draws them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from harness.errors import SpecError, StoreError
from harness.families.pipe import Pipe, pixels

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

KEPT = 1024  # prompts whose embeddings stay in memory: 240 MB for SD 1.x


class StableDiffusion(Pipe):
    """A prompt is text; its condition is the text encoder's output (n, context, width)."""

    family: ClassVar[str] = "text-to-image"
    layout: ClassVar[str] = "Stable Diffusion 1.x/2.x"
    components: ClassVar[tuple[str, ...]] = ("unet", "text_encoder", "vae")
    clips: ClassVar[bool] = False

    def __init__(self, sd: StableDiffusionPipeline, device: torch.device) -> None:
        self.tokenizer = sd.tokenizer
        super().__init__({name: getattr(sd, name) for name in self.components}, sd.scheduler.config, device)

    @classmethod
    def load(cls, folder: Path, source: str, device: torch.device, variant: str | None) -> StableDiffusion:
        """The model in a diffusers folder, in float32."""
        from diffusers import StableDiffusionPipeline
        from transformers import CLIPTextModel

        if lacking := [part for part in (*cls.components, "tokenizer", "scheduler") if not (folder / part).is_dir()]:
            raise StoreError(f"'{source}' has no {lacking[0]}; a diffusers folder of the {cls.layout} layout is needed")
        how = {"dtype": torch.float32, "variant": variant, "use_safetensors": True}  # an fp16 folder would mix dtypes otherwise
        text_encoder, found = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", output_loading_info=True, **how)
        if found["missing_keys"]:  # they would be drawn at random
            raise KeyError(f"text_encoder lacks {', '.join(sorted(found['missing_keys']))}")
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return cls(StableDiffusionPipeline.from_pretrained(folder, **how, text_encoder=text_encoder, **nothing), device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (n, context, width). A prompt longer than the context is an error, not a cut."""
        if len(self._embeddings) + len(prompts) > KEPT:
            self._embeddings.clear()
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeddings:
                ids = self.tokens(prompt).to(self.device)
                self._embeddings[prompt] = self.text_encoder(ids)[0][0]
        return torch.stack([self._embeddings[prompt] for prompt in prompts])

    def tokens(self, prompt: str) -> Tensor:
        """Token ids (1, context) of a prompt, padded as the tokenizer pads."""
        limit = self.tokenizer.model_max_length
        ids = self.tokenizer(prompt).input_ids
        if len(ids) > limit:
            raise SpecError(f"prompt {prompt!r} takes {len(ids)} tokens and this model reads {limit}; shorten it")
        return self.tokenizer(prompt, padding="max_length", max_length=limit, return_tensors="pt").input_ids

    def predict(self, x_t: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """The UNet's output (n, c, h, w), in its own parametrisation (epsilon or v)."""
        return self.unet(x_t, t, encoder_hidden_states=embeddings).sample

    @torch.no_grad()
    def latents(self, images: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation (n, c, h, w), scaled, of uint8 images (n, 3, H, W)."""
        parts = []
        for chunk in images.split(batch):
            posterior = self.vae.encode(chunk.to(self.device).float() / 127.5 - 1).latent_dist
            parts.append((posterior.mean, posterior.std))
        scale = self.vae.config.scaling_factor
        mean, std = (torch.cat(part) * scale for part in zip(*parts, strict=True))
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images (n, 3, H, W) on the CPU."""
        return pixels(self.vae.decode(latents / self.vae.config.scaling_factor).sample)
