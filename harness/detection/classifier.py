"""A classifier as a detector: any timm architecture with its weights in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from harness import pocket
from harness.errors import StoreError
from harness.spec import key, sha256

FOLDERS = {"pocket": pocket.DETECTOR, "pocket-style": pocket.STYLE}


class Detector:
    """Names what it sees: softmax over `labels`, one of which is the explicit none class.

    The folder holds `config.json` (architecture, model_args, labels, none, image_size, mean, std) and
    `model.safetensors`. `address` is the digest of both with this class's version.
    """

    version = 1

    def __init__(self, folder: str) -> None:
        path = FOLDERS.get(folder, Path(folder))
        try:
            self.config: Mapping[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
            weights = load_file(path / "model.safetensors")
        except OSError as error:
            raise StoreError(f"no classifier in '{path}': {error}; it needs config.json and model.safetensors") from error
        self.labels: tuple[str, ...] = tuple(self.config["labels"])
        self.none: str = self.config["none"]
        self.address = key(["classifier", self.version, sha256(path / "config.json"), sha256(path / "model.safetensors")])
        model = timm.create_model(self.config["architecture"], num_classes=len(self.labels), **self.config["model_args"])
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 64) -> Tensor:
        """Probabilities (n, classes) for images (n, 3, h, w) in [0, 1]."""
        return torch.cat([self._probabilities(chunk) for chunk in images.split(batch)])

    def _probabilities(self, images: Tensor) -> Tensor:
        size = self.config["image_size"]
        if images.shape[-1] != size or images.shape[-2] != size:
            images = interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(self.config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        return self.model((images - mean) / std).softmax(dim=1)
