"""What the closed forms cost at the true size of Stable Diffusion 1.4 and SDXL, on random weights, on the CPU.

`python -m tests.bench_closed_forms [sd14|sdxl] [method ...]` prints seconds and peak memory for 1, 10 and 100 concepts,
after text encoding: the vectors are given. Each case runs in a process of its own, for its peak to be its own.
To add a method, add a line to METHODS.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from harness.unlearning import rece, uce

CONTEXT, COUNTS = 77, (1, 10, 100)
SHAPES = {  # context width, and how many key and value matrices there are of each output width
    "sd14": (768, {320: 10, 640: 10, 1280: 12}),
    "sdxl": (2048, {640: 20, 1280: 120}),
}


@dataclass(frozen=True)
class Case:
    """Everything that a closed form may want, float32 weights and float64 vectors."""

    weights: list[Tensor]  # (out, d) each
    prompts: Tensor  # (concepts * 77, d), all positions of each concept's prompt
    guides: Tensor  # (concepts * 77, d)
    kept: Tensor  # (preserved * 77, d): the empty prompt and ten names

    @classmethod
    def of(cls, model: str, concepts: int) -> Case:
        """Random numbers of about the true size: an embedding's norm is about 28, a weight about 0.03."""
        rng, (width, layers) = torch.Generator().manual_seed(0), SHAPES[model]
        weights = [torch.randn(out, width, generator=rng) * 0.03 for out, count in layers.items() for _ in range(count)]
        vectors = [torch.randn(n * CONTEXT, width, generator=rng).double() * 28 / width**0.5 for n in (concepts, concepts, 11)]
        return cls(weights, *vectors)

    def tails(self) -> tuple[Tensor, Tensor]:
        """Concept and guide vectors from the third position on: a name of two word pieces."""
        return tuple(each.unflatten(0, (-1, CONTEXT))[:, 2:].flatten(0, 1) for each in (self.prompts, self.guides))  # type: ignore[return-value]  # two


def run_uce(case: Case) -> None:
    """UCE with its defaults."""
    uce.multiply(case.weights, uce.edit(*case.tails(), case.kept, 1.0, 0.1, 0.5))


def run_rece(case: Case) -> None:
    """RECE with its defaults: UCE and three epochs."""
    uce.multiply(case.weights, rece.Method().matrix(*case.tails(), case.kept, case.prompts, case.guides, case.weights))


METHODS: dict[str, Callable[[Case], None]] = {"uce": run_uce, "rece": run_rece}


def measure(model: str, method: str, concepts: int) -> tuple[float, float, float]:
    """Seconds, GiB before and peak GiB of one case, to be called in a fresh process."""
    case = Case.of(model, concepts)
    before, start = peak(), time.perf_counter()
    METHODS[method](case)
    return time.perf_counter() - start, before, peak()


def peak() -> float:
    """The most memory this process has held so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(model: str = "sd14", *methods: str) -> None:
    """Print the table."""
    print(f"{model}, {torch.get_num_threads()} thread(s)\n{'method':8}{'concepts':>9}{'seconds':>9}{'GiB before':>12}{'GiB peak':>10}")
    for method in methods or METHODS:
        for concepts in COUNTS:
            with get_context("spawn").Pool(1) as pool:
                seconds, before, most = pool.apply(measure, (model, method, concepts))
            print(f"{method:8}{concepts:9d}{seconds:9.2f}{before:12.2f}{most:10.2f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
