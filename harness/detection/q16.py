"""Q16: is the image inappropriate? Two learned prompts in the embedding space of CLIP ViT-L/14."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.nn.functional import normalize

from harness.detection import _eyes
from harness.detection._clip import Clip
from harness.errors import StoreError
from harness.spec import key

FETCH = (
    "Fetch data/ViT-L-14/prompts.p of ml-research/Q16 and run `python -m harness.detection convert q16 FILE FOLDER`; `clip` is a folder with OpenAI's ViT-L/14"
)
SCALE = 100.0  # CLIP's inverse temperature


class Detector:
    """Softmax over 100 times the cosines with the two prompts; the second one is *inappropriate* (arXiv 2202.06675).

    Reference: ml-research/Q16@12afe70. Differs from it: float32 instead of half precision.
    """

    version = 1

    def __init__(self, folder: str, clip: str, concept: str = "inappropriate") -> None:
        path = Path(folder)
        digests = _eyes.pinned(path, ("model.safetensors",), FETCH)
        self.clip = Clip(clip)
        prompts = _eyes.tensors(path / "model.safetensors").get("prompts")
        if prompts is None or prompts.shape != (2, self.clip.width):
            raise StoreError(f"'{path}' must hold prompts of shape (2, {self.clip.width}) to fit {self.clip.name}. {FETCH}")
        self._prompts = normalize(prompts, dim=1)
        self.labels, self.none = (concept, "none"), "none"
        self.address = key(["q16", self.version, concept, self.clip.digest, *digests.values()])
        self.description = f"Q16 prompts on {self.clip.name}, {_eyes.UNTESTED}"

    def __call__(self, images: Tensor, batch: int = 64) -> Tensor:
        """Probabilities (n, 2) for images (n, 3, h, w) in [0, 1]."""
        return (SCALE * self.clip.images(images, batch) @ self._prompts.flip(0).T).softmax(dim=1)
