"""Published pickles to safetensors. The only place of the project where a pickle is opened, and none that runs code."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.errors import SpecError, StoreError, unknown

HALF = [0.5, 0.5, 0.5]
Tensors = dict[str, Tensor]
Made = tuple[Tensors, dict[str, Any] | None]  # weights and config.json
ARRAY = {("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}  # what an array is pickled with
UNTESTED = ", untested with real weights"


def state(file: Path, inside: str | None = None) -> Tensors:
    """The tensors of a torch checkpoint, or of its entry `inside`; `weights_only`, so nothing in it can run."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise StoreError(f"'{file}' holds more than tensors or is no torch checkpoint, so it is not opened: {error}") from error
    if inside and isinstance(found, Mapping):
        found = found.get(inside, found)
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise StoreError(f"'{file}' holds no table of tensors{f' under {inside!r}' if inside else ''}")
    return tensors


class _Array(pickle.Unpickler):
    """Rebuilds NumPy arrays and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) not in ARRAY:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")
        return super().find_class(module, name)


def array(file: Path) -> Tensor:
    """A pickled NumPy array or list of numbers."""
    try:
        with file.open("rb") as opened:
            return torch.as_tensor(_Array(opened).load())
    except (pickle.UnpicklingError, TypeError, ValueError, RuntimeError, EOFError) as error:
        raise StoreError(f"'{file}' holds more than an array, so it is not opened: {error}") from error


def labels(file: Path | None) -> list[str]:
    """Class names in the checkpoint's order: one a line, or GCD's labels.csv (sorted by folder name; the name ends at `_[`)."""
    if file is None:
        raise SpecError("these weights do not know their labels; give --labels FILE, one name a line in the checkpoint's order")
    if file.suffix != ".csv":
        found = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    else:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = sorted(list(csv.reader(opened))[1:], key=lambda row: row[0])
        found = [row[0].split("_[")[0].replace("_", " ") for row in rows if row]
    if len(set(found)) != len(found) or not found:
        raise SpecError(f"'{file}' must name every class once, got {len(found)} names of which {len(set(found))} differ")
    return found


def described(architecture: str, known: Sequence[str], none: str | None = None) -> dict[str, Any]:
    """config.json of a classifier that sees 224 pixels, resized bilinearly, in [-1, 1]."""
    return {
        "architecture": architecture, "model_args": {}, "labels": list(known), "none": none,
        "image_size": 224, "interpolation": "bilinear", "mean": HALF, "std": HALF,
    }  # fmt: skip


def _classifier(architecture: str) -> Callable[[Path, Path | None, str | None], Made]:
    def make(file: Path, names: Path | None, none: str | None) -> Made:
        found, known = state(file, "model_state_dict"), labels(names)
        if none is not None and none not in known:
            raise unknown("none label", none, known)
        return found, described(architecture, known, none) | {"untested": UNTESTED}

    return make


def _gcd(file: Path, names: Path | None, none: str | None) -> Made:
    found = {name.removeprefix("model."): tensor for name, tensor in state(file, "model_state").items() if name.startswith("model.")}
    if "fc1.weight" not in found:
        raise StoreError(f"'{file}' holds no 'model.fc1.weight'; it is not GCD's checkpoint")
    return found, {"architecture": "resnet50", "width": len(found["fc1.weight"]), "labels": labels(names)}


RECIPES: Mapping[str, Callable[[Path, Path | None, str | None], Made]] = {
    "unlearncanvas": _classifier("vit_large_patch16_224"),
    "resnet34": _classifier("resnet34"),
    "gcd": _gcd,
    "q16": lambda file, names, none: ({"prompts": array(file).float()}, None),
    "inception": lambda file, names, none: (state(file), None),
    "laion-nsfw": lambda file, names, none: (state(file), None),
}


def convert(kind: str, file: Path, folder: Path, names: Path | None = None, none: str | None = None) -> Sequence[Path]:
    """Write `model.safetensors`, and `config.json` where there is something to say, into `folder`; returns what was written."""
    if kind not in RECIPES:
        raise unknown("kind of weights", kind, RECIPES)
    if not file.is_file():
        raise SpecError(f"no file '{file}' to convert")
    tensors, config = RECIPES[kind](file, names, none)
    if (
        config
        and (heads := [name for name in ("head.weight", "fc.weight", "fc2.weight") if name in tensors])
        and len(tensors[heads[0]]) != len(config["labels"])
    ):
        raise SpecError(f"the weights have {len(tensors[heads[0]])} classes, the label file {len(config['labels'])}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    written = [folder / "model.safetensors"]
    if config:
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        written.append(folder / "config.json")
    return written
