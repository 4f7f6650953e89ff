"""Stable Diffusion XL: two text encoders, and what the UNet is told besides: the prompt as a whole, and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.errors import SpecError, StoreError
from harness.families.stable_diffusion import StableDiffusion, length, padded


class StableDiffusionXL(StableDiffusion):
    """A prompt is text; its condition is a row (n, context x width + pooled): what cross-attention reads, then the prompt's pooled vector.

    Both are the encoders' own: penultimate layers side by side (768 + 1280), and the second encoder's projection. "" is all zeros, the
    unconditional condition, where the model says so (`force_zeros_for_empty_prompt`). The sizes that the UNet is told are those of an
    image that was made as large as it is and not cropped.
    """

    family: ClassVar[str] = "sdxl"
    layout: ClassVar[str] = "Stable Diffusion XL"
    components: ClassVar[tuple[str, ...]] = ("unet", "text_encoder", "text_encoder_2", "vae")
    pipeline: ClassVar[str] = "StableDiffusionXLPipeline"
    encoders: ClassVar[dict[str, str]] = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    unused: ClassVar[dict[str, Any]] = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}
    kept: ClassVar[int] = 384  # prompts: 245 MB

    text_encoder_2: Any
    tokenizer_2: Any

    def __init__(self, sd: Any, device: torch.device) -> None:
        super().__init__(sd, device)
        self.zeroed = bool(sd.config.force_zeros_for_empty_prompt)
        if (told := self.unet.config.addition_embed_type) != "text_time":
            raise StoreError(f"the UNet's addition_embed_type is {told!r}; a {self.layout} model's is 'text_time'")

    def encode(self, prompts: Sequence[str], cut: bool = False) -> Tensor:
        """Rows (n, context x width + pooled). A prompt longer than the context is an error or, with `cut`, cut for each encoder."""
        with torch.no_grad():
            said = [not self.zeroed or length(self.tokenizer, prompt) > 2 for prompt in prompts]  # more than start and end
            return self._encoded(prompts, cut) * torch.tensor(said, device=self.device)[:, None]

    def words(self, prompts: Sequence[str]) -> Tensor:
        """What the encoders say of each prompt, position by position (n, context, width); of "" too."""
        with torch.no_grad():
            return self._parted(self._encoded(prompts))[0]

    def _read(self, prompt: str, cut: bool) -> Tensor:
        ids = [padded(tokenizer, prompt, cut).to(self.device) for tokenizer in (self.tokenizer, self.tokenizer_2)]
        if length(self.tokenizer, prompt) != length(self.tokenizer_2, prompt):
            raise SpecError(f"the model's two tokenizers take prompt {prompt!r} apart in different places; what is said of its positions would be wrong")
        one, two = (encoder(each, output_hidden_states=True) for encoder, each in zip((self.text_encoder, self.text_encoder_2), ids, strict=True))
        words = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        return torch.cat([words.flatten(1), two.text_embeds], dim=1)[0]

    def _parted(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What cross-attention reads (n, context, width), and the pooled vectors (n, pooled)."""
        pooled = self.text_encoder_2.config.projection_dim
        return rows[:, :-pooled].unflatten(1, (-1, self.unet.config.cross_attention_dim)), rows[:, -pooled:]

    def denoised(self, x_t: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """One pass of the UNet over the whole batch."""
        words, pooled = self._parted(embeddings)
        size = [self.factor * side for side in x_t.shape[-2:]]
        sizes = torch.tensor([*size, 0, 0, *size], device=x_t.device, dtype=x_t.dtype).expand(len(x_t), -1)  # original, crop, target
        return self.unet(x_t, t, encoder_hidden_states=words, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
