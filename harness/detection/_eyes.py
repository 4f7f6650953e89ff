"""What all eyes share: a device, batches, sizes, and weights whose digests are pinned on first use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from harness.errors import StoreError
from harness.spec import sha256

PINS = "pinned.json"  # beside the weights: what they were when they were first used
UNTESTED = "untested with real weights"


def device() -> torch.device:
    """The worker's GPU if it has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seen(look: Callable[[Tensor], Tensor], images: Tensor, batch: int, where: torch.device) -> Tensor:
    """`look` at images (n, 3, h, w), `batch` at a time on the device `where`; float32 on the CPU."""
    with torch.no_grad():
        return torch.cat([look(chunk.to(where)).float().cpu() for chunk in images.split(batch)])


def resized(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Images (n, 3, size, size) with antialiasing; what is not square is squashed."""
    if images.shape[-2:] == (size, size):
        return images
    return interpolate(images, size=(size, size), mode=mode, antialias=True).clamp(0, 1)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std, channel by channel."""
    shift, scale = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mean, std))
    return (images - shift) / scale


def pinned(folder: Path, files: Sequence[str], fetch: str) -> Mapping[str, str]:
    """SHA-256 of these files, recorded in the folder on first use and held to the record ever after.

    `fetch` says what to get and where to put it; it is the next step of the StoreError for a missing file.
    """
    if lacking := [name for name in files if not (folder / name).is_file()]:
        raise StoreError(f"no {lacking[0]} in '{folder}'. {fetch}")
    found = {name: sha256(folder / name) for name in files}
    record = folder / PINS
    known: dict[str, str] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for name, digest in found.items():
        if known.setdefault(name, digest) != digest:
            raise StoreError(
                f"{name} in '{folder}' is not what it was when it was first used (SHA-256 {known[name][:12]}, now {digest[:12]}):"
                f" put the old file back, or delete {record} if the new one is meant"
            )
    if not record.exists() or set(found) - set(json.loads(record.read_text(encoding="utf-8"))):
        _write(record, known)
    return found


def tensors(file: Path) -> Mapping[str, Tensor]:
    """What a safetensors file holds, in float32 where it is a float."""
    try:
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise StoreError(f"'{file}' cannot be read: {error}; fetch or convert it again") from error


def _write(record: Path, known: Mapping[str, str]) -> None:
    """Whole or not at all; two workers write the same."""
    draft = record.with_suffix(f".{os.getpid()}")
    try:
        draft.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        draft.replace(record)
    except OSError as error:
        raise StoreError(f"cannot record the digests of the weights in '{record}': {error}; make the folder writable once") from error


def shared(score: Tensor) -> Tensor:
    """Probabilities (n, 2) of the one thing to be seen and of none: `score` (n,) and what is left of 1."""
    return torch.stack([score, 1 - score], dim=1)
