"""Eyes that never saw a generated picture: the concept detector and the style classifier."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from harness.pocket import labels, vocabulary
from harness.pocket.data import Pictures
from harness.pocket.pictures import SIZE
from harness.pocket.vae import to_tensor

ARCHITECTURE = "resnet18"
DETECTOR_ARGS = {"channels": [32, 48, 64, 80], "in_chans": 3}
STYLE_ARGS = {"channels": [8, 16, 24, 32], "in_chans": 3}
BATCH, RATE = 64, 3e-3


def resized(pictures: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """At the classifier's own resolution; what the model draws is smaller."""
    if pictures.shape[-1] == size:
        return pictures
    return functional.interpolate(pictures, size=(size, size), mode="bilinear", antialias=True)


def soften(pictures: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Half the sharpness (or a little more), blur, noise and contrast; one kind per eighth of the batch."""
    parts = list(pictures.chunk(8))
    for at, part in enumerate(parts):
        part = resized(resized(part, 32 if at % 2 else int(rng.integers(28, 56))))
        if rng.random() < 0.3:
            part = 0.6 * part + 0.4 * functional.avg_pool2d(part, 3, 1, 1, count_include_pad=False)
        part = part * rng.uniform(0.85, 1.1) + rng.uniform(-0.08, 0.08)
        parts[at] = part + rng.uniform(0, 0.06) * torch.from_numpy(rng.standard_normal(part.shape, dtype=np.float32))
    return torch.cat(parts).clamp(-1, 1)


def nothings(count: int, rng: np.random.Generator) -> torch.Tensor:
    """Pictures of nothing: noise, flat colours, blobs."""
    made = []
    for at in range(count):
        grid = (64, 1, 3, 8)[at % 4]
        coarse = torch.from_numpy(rng.uniform(-1, 1, (1, 3, grid, grid)).astype(np.float32))
        made.append(functional.interpolate(coarse, size=(64, 64), mode="nearest" if grid in (1, 64) else "bicubic"))
    return torch.cat(made).clamp(-1, 1)


def balance(target: np.ndarray, heavy: int, share: float) -> np.ndarray:
    """Equal chances for all classes but `heavy`, which gets `share`."""
    chance = (1.0 / np.bincount(target))[target]
    chance[target == heavy] *= share / (1 - share) * (len(np.unique(target)) - 1)
    return np.asarray(chance / chance.sum())


def train(pictures: Pictures, target: np.ndarray, classes: int, args: dict[str, Any], steps: int, seed: int, device: torch.device) -> Any:
    """Seeded training on `device`. The last class is `none`: a fifth of the pictures, and all that show nothing."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = timm.create_model(ARCHITECTURE, num_classes=classes, **args).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.15)
    chance, started = balance(target, classes - 1, 0.2), time.monotonic()
    for step in range(steps):
        rows = rng.choice(len(target), size=BATCH, p=chance)
        batch = torch.cat([soften(to_tensor(pictures.images[rows]), rng), nothings(4, rng)]).to(device)
        truth = torch.from_numpy(np.append(target[rows], [classes - 1] * 4).astype(np.int64)).to(device)
        value = functional.cross_entropy(model(batch.to(memory_format=torch.channels_last)), truth, label_smoothing=0.02)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"classifier {step}/{steps} loss {value.item():.3f} {time.monotonic() - started:.0f} s", flush=True)
    return model.cpu().eval()


def train_detector(pictures: Pictures, steps: int, seed: int, device: torch.device) -> Any:
    """People, objects (whatever their style), characters, the mask, none."""
    return train(pictures, pictures.label.astype(np.int64), len(labels()), DETECTOR_ARGS, steps, seed, device)


def train_style(pictures: Pictures, steps: int, seed: int, device: torch.device) -> Any:
    """The four styles, none."""
    styles = len(vocabulary()["concepts"]["styles"])
    target = np.where(pictures.style < 0, styles, pictures.style).astype(np.int64)
    return train(pictures, target, styles + 1, STYLE_ARGS, steps, seed, device)


@torch.no_grad()
def probabilities(model: Any, pictures: torch.Tensor) -> torch.Tensor:
    """(n, classes) of pictures in [-1, 1], of any size, on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(resized(part.to(device))).softmax(dim=1).cpu() for part in pictures.split(256)])


def save(model: Any, args: dict[str, Any], names: list[str], folder: Path) -> None:
    """`config.json` that says how to build it again, and fp16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": ARCHITECTURE, "model_args": args, "labels": names, "none": "none",
        "image_size": 64, "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def load(folder: Path) -> tuple[Any, list[str]]:
    """A saved classifier in float32, and its labels."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config["labels"]
    model = timm.create_model(config["architecture"], num_classes=len(names), **config["model_args"])
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "model.safetensors").items()})
    return model.eval(), names
