"""MACE's second stage: a LoRA on keys and values, and the attention to a phrase inside a mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from harness.pipeline import Pipe

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


def focal(t1: int, t2: int, length: int, gamma: float = 0.05) -> Tensor:
    """xi(t) = (sigmoid(gamma (t - t1)) - sigmoid(gamma (t - t2))) / Z for t = 0 .. length - 1: most of it lies between t1 and t2."""
    t = torch.arange(length, dtype=torch.float64)
    xi = torch.sigmoid(gamma * (t - t1)) - torch.sigmoid(gamma * (t - t2))
    return xi / xi.sum()


def energy(attn: Attention, query: Tensor, key: Tensor, inside: Tensor, phrase: Tensor) -> Tensor:
    """|| A (.) M ||_F^2 summed over heads and the tokens of the phrase, mean over the batch (scalar).

    `query` (n, positions, width), `key` (n, context, width), `inside` (n, positions) and `phrase` (n, context) booleans. The softmax
    is taken at the positions inside only.
    """
    q, k = (attn.head_to_batch_dim(each).unflatten(0, (len(query), -1)) for each in (query, key))
    samples = zip(q, k, inside, phrase, strict=True)
    return torch.stack([attn.get_attention_scores(q_[:, m], k_)[..., p].square().sum() for q_, k_, m, p in samples]).mean()


def shrink(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Boolean masks (n, H, W) at another size (n, h, w): true where at least half of the area is."""
    return interpolate(masks[:, None].float(), size=size, mode="area")[:, 0] >= 0.5


class Lora:
    """`W + up down` on every cross-attention key and value of the UNet: down ~ N(0, 1/rank^2), up = 0, so nothing at first.

    While `attached`, the UNet uses it, and every pass after `watch` adds each layer's `energy` to `energies`.
    """

    def __init__(self, pipe: Pipe, rank: int, rng: Generator) -> None:
        self.size = pipe.latent_shape[1:]
        from diffusers.models.attention_processor import Attention

        self.layers = {f"unet.{name}": m for name, m in pipe.unet.named_modules() if isinstance(m, Attention) and name.endswith("attn2")}
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}  # parameter name -> (up, down)
        for name, attn in self.layers.items():
            for part in ("to_k", "to_v"):
                out, width = getattr(attn, part).weight.shape
                down = (torch.randn(rank, width, generator=rng) / rank).to(pipe.device)
                self.factors[f"{name}.{part}.weight"] = torch.zeros(out, rank, device=pipe.device), down
        self.parameters = [factor.requires_grad_() for pair in self.factors.values() for factor in pair]
        self.energies: list[Tensor] = []
        self._masks = self._phrase = torch.zeros(0)

    def loras(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(up (d_out, rank), down (rank, d)) by parameter name."""
        return {name: (up.detach(), down.detach()) for name, (up, down) in self.factors.items()}

    def watch(self, masks: Tensor, phrase: Tensor) -> None:
        """Look inside `masks` (n, H, W) at the tokens of `phrase` (n, context) in the next pass."""
        self._masks, self._phrase = masks, phrase
        self.energies = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the projections; the modules themselves stay what they are."""
        handles = []
        for name, attn in self.layers.items():
            for part in ("to_k", "to_v"):
                handles.append(getattr(attn, part).register_forward_hook(self._adding(*self.factors[f"{name}.{part}.weight"])))
            queries: list[Tensor] = []
            handles.append(attn.to_q.register_forward_hook(lambda module, args, out, kept=queries: kept.append(out)))
            handles.append(attn.to_k.register_forward_hook(self._looking(attn, queries)))  # after the LoRA's
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _adding(up: Tensor, down: Tensor) -> Any:
        return lambda module, args, out: out + args[0] @ down.T @ up.T

    def _looking(self, attn: Attention, queries: list[Tensor]) -> Any:
        def look(module: torch.nn.Module, args: tuple[Tensor, ...], key: Tensor) -> None:
            query = queries.pop()
            inside = shrink(self._masks, self._shape(query.shape[1])).flatten(1)
            self.energies.append(energy(attn, query, key, inside, self._phrase))

        return look

    def _shape(self, positions: int) -> tuple[int, int]:
        """Height and width of an attention map with so many positions."""
        height, width = self.size
        scale = math.sqrt(positions / (height * width))
        return round(height * scale), round(width * scale)
