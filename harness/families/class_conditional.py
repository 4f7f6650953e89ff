"""Class-conditional DDPM in pixels, with classifier-free guidance: no text, no autoencoder, a name is a label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from harness.errors import StoreError, unknown
from harness.families.pipe import Pipe, pixels

if TYPE_CHECKING:
    from diffusers import UNet2DModel

CLASSES = "classes.json"


class ClassConditional(Pipe):
    """A prompt is the name of a class or "", the null label that follows the classes; its condition is the label (n,).

    The folder holds `unet/` (a `UNet2DModel`), `scheduler/` and `classes.json`, the names in the order of the labels.
    """

    family: ClassVar[str] = "class-conditional"
    layout: ClassVar[str] = "class-conditional DDPM"
    components: ClassVar[tuple[str, ...]] = ("unet",)
    clips: ClassVar[bool] = True

    def __init__(self, unet: UNet2DModel, config: dict[str, object], classes: Sequence[str], device: torch.device) -> None:
        self.classes = tuple(classes)
        rows = unet.config.num_class_embeds
        if rows != len(self.classes) + 1:
            wanted = f"one more than the classes, for the null label of guidance: {len(self.classes) + 1}"
            raise StoreError(f"{CLASSES} names {len(self.classes)} classes and the UNet's num_class_embeds is {rows}; it must be {wanted}")
        self._labels = {name: label for label, name in enumerate([*self.classes, ""])}
        super().__init__({"unet": unet}, config, device)

    @classmethod
    def load(cls, folder: Path, source: str, device: torch.device, variant: str | None) -> ClassConditional:
        """The model in a folder, in float32."""
        from diffusers import DDIMScheduler, UNet2DModel

        needed = f"a {cls.layout} is a folder of unet/, scheduler/ and {CLASSES}, the list of its classes in the order of the labels"
        if lacking := [part for part in ("unet", "scheduler", CLASSES) if not (folder / part).exists()]:
            raise StoreError(f"'{source}' has no {lacking[0]}; {needed}")
        classes = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
        if not isinstance(classes, list) or not all(isinstance(name, str) and name for name in classes) or len(set(classes)) < len(classes):
            raise StoreError(f"{CLASSES} of '{source}' is no list of different names; {needed}")
        how = {"dtype": torch.float32, "variant": variant, "use_safetensors": True, "output_loading_info": True}
        unet, found = UNet2DModel.from_pretrained(folder, subfolder="unet", **how)
        if found["missing_keys"]:  # they would be drawn at random
            raise KeyError(f"unet lacks {', '.join(sorted(found['missing_keys']))}")
        return cls(unet, DDIMScheduler.load_config(folder, subfolder="scheduler"), classes, device)

    def encode(self, prompts: Sequence[str], cut: bool = False) -> Tensor:
        """Labels (n,) of class names, which are never cut; "" is the null label."""
        for prompt in prompts:
            if prompt not in self._labels:
                raise unknown("class", prompt, self.classes)
        return torch.tensor([self._labels[prompt] for prompt in prompts], device=self.device)

    def tokens(self, prompt: str) -> Tensor:
        """The label of a class name, (1, 1)."""
        return self.encode([prompt])[None]

    def denoised(self, x_t: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """One pass of the UNet over the whole batch."""
        return self.unet(x_t, t, class_labels=embeddings).sample

    def latents(self, images: Tensor, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """The pixels in [-1, 1] (n, 3, h, w) and zeros: what is drawn is what is denoised."""
        mean = images.to(self.device).float() / 127.5 - 1
        return mean, torch.zeros_like(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images (n, 3, h, w) on the CPU."""
        return pixels(latents)
