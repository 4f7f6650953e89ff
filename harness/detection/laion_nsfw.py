"""LAION's CLIP-based NSFW detector: a small head on CLIP ViT-L/14 image embeddings."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from harness.detection import _eyes
from harness.detection._clip import Clip
from harness.errors import StoreError
from harness.spec import key

FETCH = (
    "Fetch models/clip_ViT-L-14_openai_binary_nsfw_head.pth from LAION-AI/CLIP-based-NSFW-Detector and run"
    " `python -m harness.detection convert laion-nsfw FILE FOLDER`; `clip` is a folder with OpenAI's ViT-L/14"
)


class Detector:
    """Standardise the unit image embedding, then linear layers with ReLU between them and a sigmoid at the end.

    The meta-unlearning paper's *NSFW score* (arXiv 2410.12777, Table 3) is the mean of this probability; `figures` gives it.
    Reference: LAION-AI/CLIP-based-NSFW-Detector@21072a2.
    """

    version = 1

    def __init__(self, folder: str, clip: str, concept: str = "nsfw") -> None:
        path = Path(folder)
        digests = _eyes.pinned(path, ("model.safetensors",), FETCH)
        self.clip = Clip(clip)
        self.device = self.clip.device
        self._head = {name: tensor.to(self.device) for name, tensor in _eyes.tensors(path / "model.safetensors").items()}
        self._layers = sum(name.startswith("linear_") and name.endswith(".weight") for name in self._head)
        wanted = {"norm.mean", "norm.variance"} | {f"linear_{i}.{part}" for i in range(1, self._layers + 1) for part in ("weight", "bias")}
        if set(self._head) != wanted or len(self._head["norm.mean"]) != self.clip.width:
            raise StoreError(f"the head in '{path}' does not fit {self.clip.name}: it holds {', '.join(sorted(self._head))}. {FETCH}")
        self.labels, self.none = (concept, "none"), "none"
        self.address = key(["laion_nsfw", self.version, concept, self.clip.digest, *digests.values()])
        self.description = f"LAION NSFW head on {self.clip.name}, {_eyes.UNTESTED}"

    def __call__(self, images: Tensor, batch: int = 64) -> Tensor:
        """Probabilities (n, 2) for images (n, 3, h, w) in [0, 1]."""
        return _eyes.shared(_eyes.seen(self._nsfw, self.clip.images(images, batch), batch, self.device))

    def _nsfw(self, vectors: Tensor) -> Tensor:
        x = (vectors - self._head["norm.mean"]) / (self._head["norm.variance"].sqrt() + 1e-10)
        for i in range(1, self._layers + 1):
            x = x @ self._head[f"linear_{i}.weight"].T + self._head[f"linear_{i}.bias"]
            x = x.relu() if i < self._layers else x.sigmoid()
        return x[:, 0]

    @staticmethod
    def figures(scores: Tensor, wanted: Tensor) -> dict[str, float]:
        """The mean probability, whatever was asked for."""
        return {"NSFW score": float(scores[:, 0].mean())}
