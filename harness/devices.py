"""How a model is computed, where that is not part of what is asked: read from the environment, so that all workers agree.

| variable | meaning |
|---|---|
| `RESURGENCE_DTYPE` | `float32` or `bfloat16`: what the UNet computes in; weights, optimizers and everything else stay in float32 |
| `RESURGENCE_MICRO_BATCH` | samples that pass the UNet at once; a stage's batch stays what it says. Default: all |
| `RESURGENCE_CHECKPOINTING` | `1`: a UNet under training keeps few activations and computes the others again |

The default precision is bfloat16 on a GPU that has it and float32 elsewhere; a model that ships with the project is always computed in
float32. Precision changes numbers, so it is part of a model's address; the other two are not. Attention is torch's
`scaled_dot_product_attention`, which picks its kernel itself, and TF32 is as torch sets it.
"""

from __future__ import annotations

import os

import torch

from harness.errors import SpecError, unknown

DTYPE, MICRO_BATCH, CHECKPOINTING = "RESURGENCE_DTYPE", "RESURGENCE_MICRO_BATCH", "RESURGENCE_CHECKPOINTING"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def precision() -> str:
    """What UNets compute in here."""
    name = os.environ.get(DTYPE, "")
    if name == "float16":
        raise SpecError(f"{DTYPE}=float16 would lose small gradients; allowed: {', '.join(DTYPES)}")
    if name and name not in DTYPES:
        raise unknown(f"precision in {DTYPE}", name, DTYPES)
    return name or ("bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "float32")


def micro_batch() -> int | None:
    """Samples that pass the UNet at once; None: all."""
    text = os.environ.get(MICRO_BATCH, "")
    if text and (not text.isdecimal() or int(text) < 1):
        raise SpecError(f"{MICRO_BATCH} is a whole number from 1, got '{text}'; leave it out to let every batch pass whole")
    return int(text) if text else None


def checkpointing() -> bool:
    """Whether activations are computed again instead of kept."""
    text = os.environ.get(CHECKPOINTING, "0")
    if text not in ("0", "1", ""):
        raise SpecError(f"{CHECKPOINTING} is 0 or 1, got '{text}'")
    return text == "1"
