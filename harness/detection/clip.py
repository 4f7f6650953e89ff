"""CLIP as a zero-shot classifier over the names of concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from harness.detection._clip import Clip
from harness.errors import SpecError
from harness.spec import key


class Detector:
    """Softmax over scaled cosines between an image and the text of every concept.

    `concepts` are the labels; `synonyms` gives a label further names, whose probabilities are added to its own.
    `none` are texts of pictures that show no concept; their probabilities are added up as the label `none`.
    MACE's evaluation (arXiv 2403.06135, CIFAR-10 objects, ViT-B/32) is `none = []`, no synonyms and this template: its paper
    reports the argmax accuracy, its released script the mean probability of the asked class. `figures` names both.
    """

    version = 1

    def __init__(
        self,
        folder: str,
        concepts: Sequence[str],
        none: Sequence[str] = ("a photo", "a blank image", "noise"),
        template: str = "a photo of the {}",
        synonyms: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if not concepts or "{}" not in template:
            raise SpecError(f"the detector clip needs concepts and a template that contains '{{}}', got {list(concepts)} and {template!r}")
        synonyms = synonyms or {}
        if strange := sorted(set(synonyms) - set(concepts)):
            raise SpecError(f"synonyms are given for '{strange[0]}', which is not among the detector's concepts")
        self.clip = Clip(folder)
        self.labels = (*concepts, *(["none"] if none else []))
        self.none = "none" if none else None
        names = [[c, *synonyms.get(c, ())] for c in concepts]
        texts = [template.replace("{}", name) for group in names for name in group] + list(none)
        owners = [i for i, group in enumerate(names) for _ in group] + [len(concepts)] * len(none)
        self._texts = self.clip.texts(texts)
        self._owner = torch.eye(len(self.labels))[owners]  # (texts, labels): which label a text speaks for
        self.address = key(["clip", self.version, self.clip.digest, list(self.labels), texts, owners])
        self.description = f"zero-shot {self.clip.name}, {len(texts)} texts '{template}' for {len(self.labels)} labels"

    def __call__(self, images: Tensor, batch: int = 64) -> Tensor:
        """Probabilities (n, labels) for images (n, 3, h, w) in [0, 1]."""
        cosines = self.clip.images(images, batch) @ self._texts.T
        return (self.clip.scale * cosines).softmax(dim=1) @ self._owner

    @staticmethod
    def figures(scores: Tensor, wanted: Tensor) -> dict[str, float]:
        """Both readings of MACE's table for images whose labels should be `wanted` (n,)."""
        return {
            "argmax accuracy": float((scores.argmax(dim=1) == wanted).float().mean()),
            "mean probability": float(scores[torch.arange(len(scores)), wanted].mean()),
        }
