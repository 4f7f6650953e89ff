"""The model in memory, and one stage at work on it: what changed, what is left for going on, and proof that nothing else moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness import pipeline
from harness.errors import PreconditionError, StoreError
from harness.pipeline import Pipe
from harness.spec import Base, Lineage, Stage
from harness.training import Run

PIECE = 2**20  # weights that are fingerprinted at once


class Memory:
    """The one model in memory, and whose weights it holds."""

    def __init__(self) -> None:
        self._pipes: dict[Base, Pipe] = {}
        self._holds: str | None = None
        self._passes = 0  # of models that are gone

    @property
    def passes(self) -> int:
        """UNet passes of all models so far."""
        return self._passes + sum(pipe.passes for pipe in self._pipes.values())

    def load(self, lineage: Lineage, tensors: Callable[[Lineage], Mapping[str, Tensor]]) -> Pipe:
        """The model with the weights of `lineage`, stage by stage as `tensors` gives them; the one it held before is gone."""
        pipe = self._base(lineage.base)
        if self._holds != lineage.key:
            self.edited()
            pipe.reset()
            for depth, stage in enumerate(lineage.stages, 1):
                found = tensors(replace(lineage, stages=lineage.stages[:depth]))
                merged = getattr(stage, "merged", None)  # an adapter stage turns its tensors into weights
                pipe.apply(merged(pipe, found) if merged else found)
            self._holds = lineage.key
        return pipe

    def edited(self) -> None:
        """The model no longer holds the weights of any lineage."""
        self._holds = None

    def forget(self) -> None:
        """Drop the model."""
        self._passes = self.passes
        self._pipes.clear()
        self.edited()

    def _base(self, base: Base) -> Pipe:
        if base not in self._pipes:
            self.forget()
            self._pipes[base] = pipeline.load(base)
        return self._pipes[base]


@dataclass(frozen=True)
class Snapshot:
    """A shorter run of the same trajectory: the steps it took, its weights (or adapter) and its optimizer's tensors."""

    steps: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Tensor]


def execute(
    pipe: Pipe,
    stage: Stage,
    task: Any,
    images: Mapping[str, Tensor],
    earlier: Snapshot | None = None,
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> tuple[dict[str, Tensor], Run]:
    """Run `stage` on `pipe`, which holds the weights of its parent, from the start or from `earlier`.

    Returns what must be kept of the result (the tensors that changed, or the adapter) and the finished run. The model is
    left with the result in it, or, after an error, with nobody knows what.
    """
    mine, adapts = pipeline.group(stage.trains), hasattr(stage, "merged")  # an adapter leaves the model's own weights alone
    before = pipe.remember([] if adapts else [name for name in pipe.named() if mine(name)])
    others = {name: _print(p) for name, p in pipe.named().items() if name not in before}
    run = Run(stage.seed, images, before, report=report)
    if earlier is not None:
        run.start, run.state = earlier.steps, dict(earlier.state)
        if adapts:
            run.adapter = dict(earlier.tensors)
        else:
            pipe.apply(earlier.tensors)
    stage(pipe, task, run)
    for p in pipe.named().values():
        p.grad = None  # as large as what was trained, and of no more use
    changed = run.adapter or {n: p.detach().cpu().clone() for n, p in pipe.named().items() if n in before and not torch.equal(p, before[n])}
    _check(stage, pipe, others, changed)
    return changed, run


def _check(stage: Stage, pipe: Pipe, others: Mapping[str, int], result: Mapping[str, Tensor]) -> None:
    moved = [name for name, p in pipe.named().items() if name in others and _print(p) != others[name]]
    if moved:
        says = "leaves an adapter" if hasattr(stage, "merged") else f"trains '{stage.trains}'"
        raise StoreError(f"{type(stage).__module__} says it {says} but it changed '{moved[0]}' too; correct its `trains`")
    if broken := [name for name, tensor in result.items() if not torch.isfinite(tensor).all()]:
        raise PreconditionError(f"{type(stage).__module__} made '{broken[0]}' infinite or NaN; try a smaller learning rate")


def _print(tensor: Tensor) -> int:
    """A fingerprint of a float32 tensor's bits: their sum weighted by place, modulo 2^64, so that changes do not cancel.

    Piece by piece: in whole the largest layers would take as much memory as a training step.
    """
    bits, found = tensor.detach().contiguous().flatten().view(torch.int32), torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start, piece in enumerate(bits.split(PIECE)):
        places = torch.arange(1, len(piece) + 1, device=bits.device) + start * PIECE
        found += (piece.long() * (places * 6364136223846793005)).sum()
    return int(found)
