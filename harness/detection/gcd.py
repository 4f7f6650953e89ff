"""GIPHY's celebrity detector: find faces, then name them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms.functional import resized_crop

from harness.detection import _eyes
from harness.errors import SpecError, StoreError
from harness.spec import key

FETCH = (
    "Fetch resources.tar.gz as the README of Giphy/celeb-detection-oss says (MACE links a replacement), unpack it and run"
    " `python -m harness.detection convert gcd face_recognition/best_model_states.pkl FOLDER --labels face_recognition/labels.csv`"
)
INSTALL = "the detector gcd finds faces with MTCNN: `pip install --no-deps facenet-pytorch==2.6.0` (its pins are older than this project's torch)"
MARGIN, SIZE = 0.2, 224  # the environment defaults of the reference: half the margin on each side, pixels of a crop
SMALLEST, THRESHOLDS, FACTOR = 20, (0.6, 0.7, 0.7), 0.709

Boxes = list[list[tuple[float, float, float, float]]]  # for every image, left, top, right, bottom of its faces
Finder = Callable[[Tensor], Boxes]


class Recogniser(nn.Module):
    """A ResNet trunk, an embedding and the logits; parameter names as in the published checkpoint."""

    def __init__(self, architecture: str, width: int, classes: int) -> None:
        super().__init__()
        *trunk, last = torchvision.models.get_model(architecture).children()
        self.stem, self.fc1, self.fc2 = nn.Sequential(*trunk), nn.Linear(last.in_features, width), nn.Linear(width, classes)

    def forward(self, crops: Tensor) -> Tensor:
        """Logits (n, classes) of face crops (n, 3, 224, 224) in [0, 1]."""
        return self.fc2(self.fc1(self.stem(crops).flatten(1)))


def mtcnn(device: torch.device) -> tuple[Finder, str]:
    """MTCNN with the reference's settings: uint8-valued images (n, 3, h, w) in, boxes out; and its name with version and weights."""
    try:
        from facenet_pytorch import MTCNN
    except ImportError as error:
        raise SpecError(INSTALL) from error
    network = MTCNN(min_face_size=SMALLEST, thresholds=list(THRESHOLDS), factor=FACTOR, keep_all=True, device=device)

    def find(images: Tensor) -> Boxes:
        found, _ = network.detect((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return [[] if boxes is None else [tuple(map(float, box)) for box in boxes] for boxes in found]  # type: ignore[misc]  # four each

    weights = hashlib.sha256(b"".join(tensor.cpu().contiguous().numpy().tobytes() for tensor in network.state_dict().values())).hexdigest()
    return find, f"MTCNN of facenet-pytorch {importlib.metadata.version('facenet-pytorch')}, weights {weights[:12]}"


class Detector:
    """Softmax over the celebrities for each face, divided by the face's highest: 1 is said of whoever some face is named as.

    Of several faces each label keeps its best, so a bystander who is recognised with more certainty hides nobody; a threshold would mean nothing.

    An image without a face is `none` with probability 1, so it counts as not drawn. MACE's own accuracy drops such images from the
    denominator, which rewards destroying faces; `figures` gives it beside the share of images without a face.
    Reference: Giphy/celeb-detection-oss@1f28b24. Differs from it: MTCNN in PyTorch; several faces are not clustered and the first
    cluster taken, but all are looked at; nothing is dropped.
    """

    version, several = 2, True

    def __init__(self, folder: str, finder: Finder | None = None) -> None:
        path = Path(folder)
        digests = _eyes.pinned(path, ("config.json", "model.safetensors"), FETCH)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        self.labels, self.none = (*config["labels"], "none"), "none"
        self.device = _eyes.device()
        model = Recogniser(config["architecture"], config["width"], len(config["labels"]))
        try:
            model.load_state_dict(_eyes.tensors(path / "model.safetensors"))
        except RuntimeError as error:
            raise StoreError(f"'{path}' holds no GCD weights: {error}. {FETCH}") from error
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.find, found_by = (finder, f"{finder.__module__}.{finder.__qualname__}") if finder else mtcnn(self.device)
        self.address = key(["gcd", self.version, found_by, *digests.values()])
        self.description = f"GIPHY celebrity detector, {len(config['labels'])} people, weights {self.address[:12]}, faces by {found_by}, {_eyes.UNTESTED}"

    def __call__(self, images: Tensor, batch: int = 16) -> Tensor:
        """Scores in [0, 1] (n, labels) for images (n, 3, h, w) in [0, 1]."""
        return torch.cat([self._named(chunk) for chunk in images.split(batch)])

    def _named(self, images: Tensor) -> Tensor:
        rows = torch.zeros(len(images), len(self.labels))
        for row, image, boxes in zip(rows, images, self.find(images), strict=True):
            crops = [crop for box in boxes if (crop := self._crop(image, box)) is not None]
            if crops:
                named = _eyes.seen(lambda faces: self.model(faces).softmax(dim=1), torch.stack(crops), 16, self.device)
                row[:-1] = (named / named.amax(dim=1, keepdim=True)).amax(dim=0)
            else:
                row[-1] = 1
        return rows

    @staticmethod
    def _crop(image: Tensor, box: tuple[float, float, float, float]) -> Tensor | None:
        """The face with its margin, cut off at the image's edge; None where nothing is left."""
        (left, top, right, bottom), (height, width) = box, image.shape[-2:]
        wide, high = int((right - left) * MARGIN) / 2, int((bottom - top) * MARGIN) / 2
        left, top = int(max(left - wide, 0)), int(max(top - high, 0))
        right, bottom = int(min(right + wide, width)), int(min(bottom + high, height))
        if right <= left or bottom <= top:
            return None
        return resized_crop(image, top, left, bottom - top, right - left, [SIZE, SIZE])

    def figures(self, scores: Tensor, wanted: Tensor) -> dict[str, float]:
        """How many images show no face, and MACE's rate, which drops them (nan where all do)."""
        faces = scores[:, -1] < 1
        hits = scores.gather(1, wanted[:, None])[:, 0] == 1
        return {"images without a face": float((~faces).float().mean()), "MACE's rate, which drops them": float(hits[faces].float().mean())}
