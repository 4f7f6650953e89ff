"""A tiny model, the run of a stage on it, and a witness of every UNet pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.pipeline import Pipe, StableDiffusion, group
from harness.spec import Task
from harness.training import Run
from tests import tiny

CPU = torch.device("cpu")


def pipe() -> Pipe:
    """A fresh tiny model; always the same weights."""
    return StableDiffusion(tiny.pipeline(), CPU)


def pictures(count: int, seed: int = 0) -> Tensor:
    """Random uint8 images (count, 3, 16, 16)."""
    return torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def weights(model: Pipe, belongs: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Copies of the named weights that `belongs` accepts."""
    return {name: p.detach().clone() for name, p in model.named().items() if belongs(name)}


def run(model: Pipe, stage: Any, task: Task, **change: Any) -> Run:
    """What the engine hands to a stage: its images and the weights as it finds them."""
    images = {name: pictures(len(chosen.prompts), i) for i, (name, chosen) in enumerate(stage.images(task).items())}
    return Run(**{"seed": stage.seed, "images": images, "original": weights(model, group(stage.trains)), **change})


def after(stage: Any, task: Task | None = None, model: Pipe | None = None) -> tuple[Pipe, Run]:
    """A tiny model after `stage`, and the stage's run."""
    model, task = model or pipe(), task or tiny.task()
    mine = run(model, stage, task)
    stage(model, task, mine)
    return model, mine


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit for bit the same tensors under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moved(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> set[str]:
    """The names whose tensors differ."""
    return {name for name in a if not torch.equal(a[name], b[name])}


@dataclass(frozen=True)
class Pass:
    """One call of the UNet: what went in, what came out, and the weight `watched` at that moment."""

    x_t: Tensor
    t: Tensor
    embeddings: Tensor
    out: Tensor
    weight: Tensor

    @property
    def learns(self) -> bool:
        """A gradient can flow back from it."""
        return self.out.requires_grad


def witness(model: Pipe, watched: str = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight") -> list[Pass]:
    """A list that every later UNet pass is written to."""
    seen: list[Pass] = []

    def note(module: torch.nn.Module, args: tuple[Tensor, ...], given: dict[str, Tensor], output: Any) -> None:
        seen.append(Pass(args[0].detach().clone(), args[1], given["encoder_hidden_states"], output.sample, model.named()[watched].detach().clone()))

    model.unet.register_forward_hook(note, with_kwargs=True)
    return seen


def backwards(model: Pipe) -> list[int]:
    """A list that every later backward pass through the whole UNet writes its number of samples to."""
    seen: list[int] = []

    def note(module: torch.nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if output.sample.requires_grad:
            output.sample.register_hook(lambda gradient: seen.append(len(gradient)))

    model.unet.register_forward_hook(note)
    return seen
