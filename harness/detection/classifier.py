"""A classifier as a detector: any timm architecture with its weights in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from harness import pocket
from harness.detection import _eyes
from harness.errors import StoreError
from harness.spec import key, sha256

FOLDERS = {"pocket": pocket.DETECTOR, "pocket-style": pocket.STYLE}
FILES = ("config.json", "model.safetensors")
FETCH = (
    "A classifier folder holds config.json and model.safetensors. For UnlearnCanvas fetch style50.pth (styles) or style50_cls.pth (objects) from the"
    " classifiers that OPTML-Group/UnlearnCanvas links, for CIFAR-10 a torchvision ResNet-34 checkpoint (or make the folder with"
    " `python -m suites.cifar10.classifier`), write its class names into labels.txt, one a line"
    " in its order (UnlearnCanvas: theme_available or class_available in evaluation/constants/const.py), and run"
    " `python -m harness.detection convert unlearncanvas|resnet34 FILE FOLDER --labels labels.txt`"
)


class Detector:
    """Names what it sees: softmax over `labels`, one of which may be an explicit none class.

    The folder holds `config.json` (architecture, model_args, labels, none, image_size, mean, std) and
    `model.safetensors`. `address` is the digest of both with this class's version.
    """

    version = 1

    def __init__(self, folder: str) -> None:
        path = FOLDERS.get(folder, Path(folder))
        if folder in FOLDERS:
            digests: Mapping[str, str] = {name: sha256(path / name) for name in FILES}
        else:
            digests = _eyes.pinned(path, FILES, FETCH)
        self.config: Mapping[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        self.labels: tuple[str, ...] = tuple(self.config["labels"])
        self.none: str | None = self.config["none"]
        self.address = key(["classifier", self.version, *digests.values()])
        self.description = f"classifier {self.config['architecture']} in '{path.name}', {len(self.labels)} labels" + self.config.get("untested", "")
        self.path, self.device = path, _eyes.device()
        if folder not in FOLDERS:
            _ = self.model  # somebody's weights are tried before anything is drawn; ours are loaded when there is something to see

    @cached_property
    def model(self) -> Any:
        """The network, in evaluation mode; StoreError if the weights are not its own."""
        import timm  # it brings torchvision along

        model = timm.create_model(self.config["architecture"], num_classes=len(self.labels), **self.config["model_args"])
        try:
            model.load_state_dict(_eyes.tensors(self.path / "model.safetensors"))
        except RuntimeError as error:
            raise StoreError(f"the weights in '{self.path}' are not a {self.config['architecture']} of {len(self.labels)} labels: {error}") from error
        return model.eval().requires_grad_(False).to(self.device)

    def __call__(self, images: Tensor, batch: int = 64) -> Tensor:
        """Probabilities (n, classes) for images (n, 3, h, w) in [0, 1]."""
        return _eyes.seen(self._probabilities, images, batch, self.device)

    def _probabilities(self, images: Tensor) -> Tensor:
        images = _eyes.resized(images, self.config["image_size"], self.config.get("interpolation", "bicubic"))
        return self.model(_eyes.normalised(images, self.config["mean"], self.config["std"])).softmax(dim=1)
