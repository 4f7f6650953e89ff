"""Nearest class in a gallery of the base model's own images: a detector for any concept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from harness.detection._clip import Clip
from harness.errors import PreconditionError, SpecError
from harness.spec import ImageSet, key, seed_of

SCALE = 100.0  # CLIP's usual inverse temperature: how sharp the probabilities are, never which label wins


class Detector:
    """Enrols what the base model draws for every erased and retained concept; anchor images are the none class.

    An image takes the label of the nearest class mean on CLIP's unit sphere. It is `none` where an anchor's mean is nearer,
    or where no mean is as near as `share` of the enrolled images are to their own class (each left out of its mean):
    that threshold comes from base images alone and is frozen before any other model is looked at.
    Needs no model of anybody in particular, but sees only as well as the embedding tells the concepts apart; the task's
    *instruments* claim says whether that is well enough.
    """

    version = 1

    def __init__(self, folder: str, images: int = 8, share: float = 0.98) -> None:
        if images < 2 or not 0 < share < 1:
            raise SpecError(f"a gallery needs at least 2 images per prompt and a share strictly between 0 and 1, got {images} and {share}")
        self.clip, self.count, self.share = Clip(folder), images, share
        self.labels: tuple[str, ...] = ()
        self.none = "none"

    def enrolment(self, task: Any) -> Mapping[str, ImageSet]:
        """What the base model must draw, by label; `none` is the anchor."""
        groups = [(c, task.erased.asking(c)) for c in task.erased.concepts] + [(c, task.retained.asking(c)) for c in task.retained.concepts]
        groups.append((self.none, tuple(p for c in task.anchor.concepts for p in task.anchor.asking(c))))
        return {label: self._drawn(prompts) for label, prompts in groups}

    def _drawn(self, prompts: tuple[str, ...]) -> ImageSet:
        """Seeds of their own, so that no enrolled image is ever measured."""
        rounds = range(self.count)
        return ImageSet(prompts * self.count, tuple(seed_of("gallery", p, r) for r in rounds for p in prompts))

    def enrol(self, images: Mapping[str, Tensor]) -> None:
        """Learn the classes from uint8 images (n, 3, h, w) by label."""
        if self.none not in images or len(images) < 2:
            raise SpecError(f"a gallery needs images of '{self.none}' and of at least one concept, got {', '.join(images) or 'nothing'}")
        self.labels = (*(label for label in images if label != self.none), self.none)
        vectors = [self.clip.images(images[label].float() / 255) for label in self.labels]
        self._means = normalize(torch.stack([each.mean(0) for each in vectors]), dim=1)  # (labels, width)
        own = torch.cat([self._left_out(each) for each in vectors[:-1]])
        self.floor = float(own.quantile(1 - self.share))
        digest = hashlib.sha256(b"".join(images[label].contiguous().numpy().tobytes() for label in self.labels)).hexdigest()
        self.address = key(["gallery", self.version, self.clip.digest, list(self.labels), self.share, digest])
        counted = sum(len(each) for each in images.values())
        self.description = (
            f"gallery of {counted} base images of {len(self.labels)} classes in {self.clip.name}, nearest mean at cosine {self.floor:.3f} or more"
        )

    @staticmethod
    def _left_out(vectors: Tensor) -> Tensor:
        """Cosine (n,) of each vector with the mean of the others."""
        others = normalize(vectors.sum(0) - vectors, dim=1)
        return (vectors * others).sum(1)

    def __call__(self, images: Tensor, batch: int = 64) -> Tensor:
        """Probabilities (n, labels) for images (n, 3, h, w) in [0, 1]."""
        if not self.labels:
            raise PreconditionError("the gallery is empty; enrol the base model's images first")
        cosines = self.clip.images(images, batch) @ self._means.T
        cosines[:, -1] = cosines[:, -1].clamp(min=self.floor)
        return (SCALE * cosines).softmax(dim=1)
