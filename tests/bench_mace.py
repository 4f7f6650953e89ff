"""Seconds and memory of MACE's closed forms at the true sizes, on random numbers: `python -m tests.bench_mace [sd] [sdxl]`.

A case runs in a process of its own. It holds the original weights and one more copy of them, the refined ones, which the
fused ones then overwrite; memory is the peak above the original weights. Token vectors and LoRAs are drawn as they are needed.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor

from harness.unlearning._mace_closed import Fusion, refinement

# Token width, and the output widths of the cross-attention layers; each has a key and a value.
MODELS = {"sd": (768, [320] * 5 + [640] * 5 + [1280] * 6), "sdxl": (2048, [640] * 10 + [1280] * 60)}
CONTEXT, PROMPTS, RETAINED = 77, 30, 100  # positions, prompts of a concept, retained names (each in one prompt)


def peak() -> float:
    """The largest memory this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def mace(model: str, concepts: int) -> dict[str, float]:
    """One MACE of `concepts` names: seconds of the refinement and the fusion, GB above the original weights."""
    torch.set_num_threads(1)
    width, outputs = MODELS[model]
    rng = torch.Generator().manual_seed(0)
    weights = {f"{layer}.{part}": torch.randn(out, width, generator=rng) / width**0.5 for layer, out in enumerate(outputs) for part in "kv"}

    def tokens(prompts: int) -> Tensor:
        return torch.randn(prompts * CONTEXT, width, generator=rng).double()

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(concepts * PROMPTS):
            yield tokens(1), tokens(1)

    before = peak()
    prior = sum(e.T @ e for e in map(tokens, [1] * RETAINED))
    start = time.perf_counter()
    m = refinement(pairs(), prior, 0.1, 0.0)
    refined = {name: (w.double() @ m).float() for name, w in weights.items()}
    half = time.perf_counter()
    fusion = Fusion(prior, 0.1, 0.0, {name: w.shape for name, w in weights.items()}, concepts)
    for _ in range(concepts):
        e = tokens(PROMPTS)
        loras = {name: (torch.randn(len(w), 1, generator=rng), torch.randn(1, width, generator=rng)) for name, w in weights.items()}
        fusion.add(e.T @ e, loras)
    for name, w in fusion.weights(refined, weights):
        refined[name].copy_(w)
    end = time.perf_counter()
    return {"refinement": half - start, "fusion": end - half, "GB above": peak() - before, "GB of weights": sum(w.nbytes for w in weights.values()) / 1e9}


def main(models: list[str]) -> None:
    """Print a line a case."""
    for model in models:
        for concepts in (1, 10, 100):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found = pool.submit(mace, model, concepts).result()
            print(f"{model:5} {concepts:4} concepts: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["sd"])
