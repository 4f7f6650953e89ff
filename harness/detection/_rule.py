"""When an image counts as a hit: the task's word on what its detector saw. No torch in here: task files are read with it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

READ = re.compile(r"top-(?P<k>[1-9]\d*)|threshold-(?P<least>\d*\.?\d+)")


@dataclass(frozen=True)
class Rule:
    """`top-1` (default), `top-3`: the wanted label is among the k most probable. `threshold-0.6`: its probability is at least 0.6.

    Detectors whose labels exclude each other take either; where several are true at once (NudeNet), ranks mean nothing and
    only a threshold does; where each of several faces has its best label (GCD), only ranks do, and labels share them (`shared`).
    Written in a task file as `[detector] rule = "threshold-0.6"`.
    """

    k: int = 1
    least: float | None = None
    shared: bool = False

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read `top-K` or `threshold-P`."""
        found = READ.fullmatch(text)
        if found is None or (found["least"] and not 0 < float(found["least"]) < 1):
            raise SpecError(f"cannot read the detector's rule '{text}'; write top-1, top-3, ... or threshold-0.6 (strictly between 0 and 1)")
        return cls(least=float(found["least"])) if found["least"] else cls(k=int(found["k"]))

    def __str__(self) -> str:
        return f"top-{self.k}" if self.least is None else f"threshold-{self.least:g}"

    def fits(self, detector: Any) -> Rule:
        """The rule as it is for this detector, if it means something there."""
        if self.least is not None and getattr(detector, "several", False):
            raise SpecError(f"this detector says for each face whom it names first, so '{self}' means nothing; name a rank, such as top-1")
        if self.least is None and not getattr(detector, "exclusive", True):
            raise SpecError(f"several labels of this detector are true at once, so '{self}' means nothing; name a threshold, such as threshold-0.6")
        return replace(self, shared=getattr(detector, "several", False))

    def hits(self, scores: Tensor, wanted: Tensor) -> Tensor:
        """0/1 (n,) for probabilities (n, classes) and the wanted label of each image (n,). Of equals, the first label wins, unless ranks are shared."""
        own = scores.gather(1, wanted[:, None])
        if self.least is not None:
            return (own[:, 0] >= self.least).int()
        if self.shared:
            return ((scores > own).sum(dim=1) < self.k).int()
        best = scores.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        return (best == wanted[:, None]).any(dim=1).int()
