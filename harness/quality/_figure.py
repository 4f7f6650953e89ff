"""A quality figure, which is never printed without what it was measured with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A number and its conditions. Two figures can be compared only where all but `value` and `spread` are the same."""

    name: str
    value: float
    backbone: str
    size: int  # dimensions of a feature
    reference: str  # what the images are held against
    count: int  # images looked at
    resize: str
    spread: float | None = None  # standard deviation over subsets, where the estimator has one

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.4g}"
        return (
            f"{self.name} {self.value:.4g}{spread} (backbone {self.backbone}; {self.size} features; {self.count} images;"
            f" reference: {self.reference}; resize: {self.resize})"
        )
