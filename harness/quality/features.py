"""Feature extractors for torch-fidelity: Inception with sFID's spatial features, and the pocket detector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from harness import pocket
from harness.detection import _eyes
from harness.detection.classifier import Detector
from harness.spec import sha256

FETCH = (
    "Fetch weights-inception-2015-12-05-6726825d.pth from the releases of toshas/torch-fidelity (v0.2.0), run"
    " `python -m harness.detection convert inception FILE FOLDER` and give --weights FOLDER"
)
CHANNELS = 7  # of the spatial layer; sFID's own number


class Inception(FeatureExtractorInceptionV3):  # type: ignore[misc]  # torch-fidelity is not typed
    """torch-fidelity's TensorFlow-compatible InceptionV3 with one more layer, `spatial`.

    sFID (Nash et al. 2021) as guided-diffusion's evaluator computes it: the graph's `mixed_6/conv:0`, which is the 1x1 branch of
    Mixed_6d after its ReLU, first 7 channels, 17 x 17 x 7 = 2023 numbers.
    """

    features_list: list[str]

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any) -> None:
        folder = Path(feature_extractor_weights_path or "")
        _eyes.pinned(folder, ("model.safetensors",), FETCH)
        weights = _eyes.tensors(folder / "model.safetensors")
        with patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **settings: weights):  # it would unpickle
            super().__init__(name, features_list, **kwargs)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """What may be asked for."""
        return (*FeatureExtractorInceptionV3.get_provided_features_list(), "spatial")

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Features of uint8 images (n, 3, h, w), in the order in which they were requested."""
        asked, caught = self.features_list, []
        self.features_list = [name for name in asked if name != "spatial"] or ["768"]
        hook = self.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: caught.append(out))
        try:
            found = dict(zip(self.features_list, super().forward(input), strict=True))
        finally:
            self.features_list = asked
            hook.remove()
        found["spatial"] = caught[0][:, :CHANNELS].flatten(1).float()
        return tuple(found[name] for name in asked)


class Pocket(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity is not typed
    """The pocket detector's last feature vector (`pool`), and 7 channels of the stage before its last (`spatial`)."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        detector = Detector("pocket")
        self.config, self.model = detector.config, detector.model

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """What may be asked for."""
        return ("pool", "spatial")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The same for every metric."""
        return "pool"

    @staticmethod
    def can_be_compiled() -> bool:
        """Not worth it."""
        return False

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Features of uint8 images (n, 3, h, w), in the order in which they were requested."""
        images = _eyes.normalised(_eyes.resized(input.float() / 255, self.config["image_size"]), self.config["mean"], self.config["std"])
        last, maps = self.model.forward_intermediates(images, indices=[3])
        found = {"pool": self.model.global_pool(last), "spatial": maps[0][:, :CHANNELS].flatten(1)}
        return tuple(found[name] for name in self.features_list)


@dataclass(frozen=True)
class Backbone:
    """A feature extractor in torch-fidelity's registry, its layers for FID/KID and for sFID, and how it resizes."""

    name: str
    layer: str
    spatial: str
    resize: str
    says: str


BACKBONES: Mapping[str, Backbone] = {
    "pocket": Backbone(
        "resurgence-pocket", "pool", "spatial", "bicubic with antialiasing to 64 px", f"pocket detector {sha256(pocket.DETECTOR / 'model.safetensors')[:12]}"
    ),
    "inception": Backbone(
        "resurgence-inception", "2048", "spatial", "TensorFlow 1 bilinear to 299 px", "InceptionV3 of 2015-12-05 (torch-fidelity), untested with real weights"
    ),
}
for _name, _class in (("resurgence-pocket", Pocket), ("resurgence-inception", Inception)):
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, _class)
