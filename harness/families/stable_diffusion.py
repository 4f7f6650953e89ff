"""Stable Diffusion 1.x / 2.x: a text encoder names, a UNet denoises latents, an autoencoder draws them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.errors import SpecError, StoreError
from harness.families.pipe import Pipe, pixels

PIXELS = {"cpu": 2**18, "cuda": 2**20}  # of images that pass the autoencoder at once: 1 of 512 px on the CPU, 4 on a GPU
TRUSTED = ("diffusers", "transformers", "stable_diffusion", None)  # where a pipeline's parts may come from; the third is its safety checker


class StableDiffusion(Pipe):
    """A prompt is text; its condition is the text encoder's output (n, context, width)."""

    family: ClassVar[str] = "stable-diffusion"
    layout: ClassVar[str] = "Stable Diffusion 1.x/2.x"
    components: ClassVar[tuple[str, ...]] = ("unet", "text_encoder", "vae")
    clips: ClassVar[bool] = False
    pipeline: ClassVar[str] = "StableDiffusionPipeline"  # classes by name: a run that only reads the store need not load their libraries
    encoders: ClassVar[dict[str, str]] = {"text_encoder": "CLIPTextModel"}
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    unused: ClassVar[dict[str, Any]] = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}
    kept: ClassVar[int] = 1024  # prompts whose embeddings stay in memory: 240 MB for SD 1.x

    def __init__(self, sd: Any, device: torch.device) -> None:
        for name in self.tokenizers:
            setattr(self, name, getattr(sd, name))
        super().__init__({name: getattr(sd, name) for name in self.components}, sd.scheduler.config, device)
        channels = self.unet.config.in_channels, self.unet.config.out_channels, self.vae.config.latent_channels
        if len(set(channels)) > 1:
            raise StoreError(f"the UNet takes {channels[0]} channels, gives {channels[1]}, and the latents have {channels[2]}; is it an inpainting model?")
        if getattr(self.vae.config, "latents_mean", None) is not None:
            raise SpecError("the autoencoder shifts its latents (latents_mean), which is not supported; allowed: a scaling_factor alone")

    @classmethod
    def load(cls, folder: Path, source: str, device: torch.device, variant: str | None) -> StableDiffusion:
        """The model in a diffusers folder, in float32."""
        import diffusers
        import transformers

        if lacking := [part for part in (*cls.components, *cls.tokenizers, "scheduler") if not (folder / part).is_dir()]:
            raise StoreError(f"'{source}' has no {lacking[0]}; a diffusers folder of the {cls.layout} layout is needed")
        _refuse_code(folder, source)
        how = {"dtype": torch.float32, "variant": variant, "use_safetensors": True}  # an fp16 folder would mix dtypes otherwise
        parts = {}
        for part, kind in cls.encoders.items():
            parts[part], found = getattr(transformers, kind).from_pretrained(folder, subfolder=part, output_loading_info=True, **how)
            if found["missing_keys"]:  # they would be drawn at random
                raise KeyError(f"{part} lacks {', '.join(sorted(found['missing_keys']))}")
        return cls(getattr(diffusers, cls.pipeline).from_pretrained(folder, **how, **parts, **cls.unused), device)

    @classmethod
    def load_file(cls, file: Path, settings: Path, source: str, device: torch.device) -> StableDiffusion:
        """The model in one file in the layout of its original code, in float32; `settings` is a diffusers folder that needs no weights."""
        import diffusers

        _refuse_code(settings, source)
        try:
            kind = getattr(diffusers, cls.pipeline)
            return cls(kind.from_single_file(str(file), config=str(settings), local_files_only=True, dtype=torch.float32, **cls.unused), device)
        except NotImplementedError as error:  # what is not in the file was given a place and no value
            raise KeyError(f"the file lacks tensors of the model that '{settings}' describes") from error

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], cut: bool = False) -> Tensor:
        """Text embeddings (n, context, width). A prompt longer than the context is an error or, with `cut`, cut as diffusers' pipelines cut it."""
        return self._encoded(prompts, cut)

    def overlong(self, prompts: Sequence[str]) -> list[str]:
        """The prompts, each once, whose end one of the text encoders does not read."""
        readers = [getattr(self, name) for name in self.tokenizers]
        return [prompt for prompt in dict.fromkeys(prompts) if any(length(each, prompt) > each.model_max_length for each in readers)]

    def words(self, prompts: Sequence[str]) -> Tensor:
        """What cross-attention reads of each prompt, position by position (n, context, width): what keys and values are made of."""
        return self.encode(prompts)

    def _encoded(self, prompts: Sequence[str], cut: bool = False) -> Tensor:
        """Each prompt's own row, remembered as long as the weights stay."""
        if len(self._embeddings) + len(prompts) > self.kept:
            self._embeddings.clear()
        for prompt in dict.fromkeys(prompts):
            if (prompt, cut) not in self._embeddings:
                self._embeddings[prompt, cut] = self._read(prompt, cut)
        return torch.stack([self._embeddings[prompt, cut] for prompt in prompts])

    def _read(self, prompt: str, cut: bool) -> Tensor:
        return self.text_encoder(padded(self.tokenizer, prompt, cut).to(self.device))[0][0]

    def tokens(self, prompt: str) -> Tensor:
        """Token ids (1, context) of a prompt, padded as the tokenizer pads."""
        return padded(self.tokenizer, prompt)

    def denoised(self, x_t: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """One pass of the UNet over the whole batch."""
        return self.unet(x_t, t, encoder_hidden_states=embeddings).sample

    @torch.no_grad()
    def latents(self, images: Tensor, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation (n, c, h, w), scaled, of uint8 images (n, 3, H, W)."""
        parts = []
        for chunk in images.split(batch or self._at_once(*images.shape[-2:])):
            posterior = self.vae.encode(chunk.to(self.device).float() / 127.5 - 1).latent_dist
            parts.append((posterior.mean, posterior.std))
        scale = self.vae.config.scaling_factor
        mean, std = (torch.cat(part) * scale for part in zip(*parts, strict=True))
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images (n, 3, H, W) on the CPU."""
        height, width = (self.factor * side for side in latents.shape[-2:])
        parts = latents.split(self._at_once(height, width))
        return torch.cat([pixels(self.vae.decode(part / self.vae.config.scaling_factor).sample) for part in parts])

    @property
    def factor(self) -> int:
        """Pixels of an image to one place of its latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _at_once(self, height: int, width: int) -> int:
        """Images that pass the autoencoder at once."""
        return max(1, min(64, PIXELS.get(self.device.type, PIXELS["cpu"]) // (height * width)))


def length(tokenizer: Any, prompt: str) -> int:
    """How many tokens a prompt takes, start and end among them."""
    return len(tokenizer(prompt, verbose=False).input_ids)  # it would warn of what is meant to be found out


def padded(tokenizer: Any, prompt: str, cut: bool = False) -> Tensor:
    """Token ids (1, context). A prompt that does not fit is refused or, with `cut`, loses the tokens before the end token that are too many."""
    limit = tokenizer.model_max_length
    if not cut and (taken := length(tokenizer, prompt)) > limit:
        raise SpecError(f"prompt {prompt!r} takes {taken} tokens and this model reads {limit}; shorten it")
    return tokenizer(prompt, padding="max_length", truncation=cut, max_length=limit, return_tensors="pt").input_ids


def _refuse_code(folder: Path, source: str) -> None:
    """A pipeline may name classes of its own, whose code would come with it."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        named = {part: of for part, of in index.items() if part == "_class_name" or isinstance(of, list)}
    except (OSError, ValueError, AttributeError) as error:
        raise StoreError(f"'{source}' does not load: its model_index.json cannot be read ({error})") from error
    for part, of in named.items():
        if isinstance(of, list) and (part == "_class_name" or of[0] not in TRUSTED):
            raise StoreError(f"'{source}' wants code of its own for {part} ({of[0]}), which is never run here; save it with diffusers' own classes")
