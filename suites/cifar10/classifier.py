"""Train the classifier that looks at the images of `full.toml`. **Not yet run with real data.**

    python -m suites.cifar10.classifier --data cifar-10-batches-bin --weights model.safetensors [--out .weights/cifar10-resnet34] [--device cuda]

The data is the folder that `suites.cifar10.train` reads. The recipe is that of the code which SalUn, SFRon and DiMUM share: torchvision's ResNet-34
from its ImageNet weights, at 224 pixels in [-1, 1], flips, Adam at 1e-5 (its last layer at 1e-4), weight decay 5e-4, batch 128, 10 epochs.
`--weights` is a local file of these weights: model.safetensors of timm/resnet34.tv_in1k, or torchvision's checkpoint, of which nothing but tensors
is read. Nothing is fetched. Without it the network starts at random and learns at 1e-3, which is ours and not published; card.json says which.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from harness.detection import _convert, _eyes
from harness.detection.classifier import FILES, Detector
from harness.errors import ResurgenceError, StoreError
from harness.pocket import ddpm
from harness.spec import sha256
from suites.cifar10 import train

SEED, EVERY = 34, 50  # batches between two lines of progress
PACKAGES = ("torch", "timm", "numpy", "safetensors")


@dataclass(frozen=True)
class Recipe:
    """How it learns; the rates are those of a network that has seen ImageNet."""

    rate: float = 1e-5
    head: float = 1e-4  # rate of the last layer
    decay: float = 5e-4
    batch: int = 128
    epochs: int = 10
    size: int = 224  # pixels


RANDOM = {"rate": 1e-3, "head": 1e-3}  # ours, where nothing was learned before


def start(architecture: str, weights: Path | None) -> Any:
    """The network with a new last layer; everything before it from `weights`, or at random. StoreError if they are another network's."""
    torch.manual_seed(SEED)
    model = timm.create_model(architecture, num_classes=len(ddpm.CLASSES))
    if weights is None:
        return model
    found = _eyes.tensors(weights) if weights.suffix == ".safetensors" else _convert.state(weights)
    head = f"{model.pretrained_cfg['classifier']}."
    try:
        lacking, strange = model.load_state_dict({name: tensor for name, tensor in found.items() if not name.startswith(head)}, strict=False)
    except RuntimeError as error:
        raise StoreError(f"the weights in '{weights}' are not a {architecture}: {error}") from error
    if wrong := [*strange, *(name for name in lacking if not name.startswith(head))]:
        raise StoreError(f"the weights in '{weights}' are not a {architecture}: they and the network differ in {wrong[0]} and {len(wrong) - 1} other names")
    return model


def learn(model: Any, images: Tensor, truth: Tensor, recipe: Recipe, device: torch.device) -> Any:
    """The network after seeded training on uint8 images (n, 3, h, w), which it sees as the detector will show them."""
    model.to(device).train()
    head = {id(p) for p in model.get_classifier().parameters()}
    parts = [[p for p in model.parameters() if (id(p) in head) == last] for last in (False, True)]
    groups = [{"params": part, "lr": rate} for part, rate in zip(parts, (recipe.rate, recipe.head), strict=True)]
    optimiser = torch.optim.Adam(groups, weight_decay=recipe.decay)
    draws, started = torch.Generator().manual_seed(SEED), time.monotonic()
    for epoch in range(1, recipe.epochs + 1):
        batches = torch.randperm(len(images), generator=draws).split(recipe.batch)
        for at, rows in enumerate(batches, 1):
            flipped = torch.rand(len(rows), 1, 1, 1, generator=draws) < 0.5
            chosen = torch.where(flipped, images[rows].flip(-1), images[rows]).to(device).float() / 255
            seen = _eyes.normalised(_eyes.resized(chosen, recipe.size, "bilinear"), _convert.HALF, _convert.HALF)
            value = functional.cross_entropy(model(seen), truth[rows].to(device))
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            if at % EVERY == 0 or at == len(batches):
                print(f"epoch {epoch}/{recipe.epochs} batch {at}/{len(batches)} loss {value.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
    return model.eval()


def save(model: Any, out: Path, architecture: str, size: int) -> None:
    """What the detector `classifier` loads. A record of weights that were here before does not speak of these."""
    out.mkdir(parents=True, exist_ok=True)
    (out / _eyes.PINS).unlink(missing_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, out / "model.safetensors")
    config = _convert.described(architecture, ddpm.CLASSES) | {"image_size": size}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def accuracy(out: Path, images: Tensor, truth: Tensor) -> dict[str, Any]:
    """How often the detector in this folder names the class of uint8 images (n, 3, h, w): of all, and of each class that is among them."""
    right = (Detector(str(out))(images.float() / 255).argmax(dim=1) == truth).double()
    each = {name: round(float(right[truth == at].mean()), 4) for at, name in enumerate(ddpm.CLASSES) if (truth == at).any()}
    return {"images": len(images), "accuracy": round(float(right.mean()), 4), "accuracy_by_class": each}


def card(given: argparse.Namespace, recipe: Recipe, test: dict[str, Any]) -> None:
    """Write `card.json`: what it was made of, and how often it is right."""
    content = {
        "architecture": given.architecture,
        "start": {"file": given.weights.name, "sha256": sha256(given.weights)} if given.weights else "random",
        "recipe": dataclasses.asdict(recipe),
        "seed": SEED,
        "data": {name: sha256(given.data / name) for name in (*train.FILES, *train.TEST)},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "files": {name: sha256(given.out / name) for name in FILES},
        "test": test,
    }
    (given.out / "card.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True, help="the unpacked cifar-10-batches-bin")
    made.add_argument("--weights", type=Path, help="file of ImageNet weights; left out, the network starts at random")
    made.add_argument("--out", type=Path, default=Path(".weights/cifar10-resnet34"))
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--epochs", type=int, default=Recipe.epochs)
    made.add_argument("--batch", type=int, default=Recipe.batch)
    made.add_argument("--architecture", default="resnet34", help="timm's name")
    made.add_argument("--size", type=int, default=Recipe.size, help="pixels that it sees")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, train, save, measure; 2 if the data or the weights are not there."""
    given = parser().parse_args(arguments)
    recipe = Recipe(batch=given.batch, epochs=given.epochs, size=given.size, **({} if given.weights else RANDOM))
    try:
        (images, truth), test = train.read(given.data), train.read(given.data, train.TEST)
        model = start(given.architecture, given.weights)
    except ResurgenceError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(images)} pictures to learn from, {len(test[0])} to be tested on; starts {given.weights or 'at random'}", flush=True)
    save(learn(model, images, truth, recipe, torch.device(given.device)), given.out, given.architecture, given.size)
    card(given, recipe, found := accuracy(given.out, *test))
    print(f"right in {found['accuracy']:.4f} of {found['images']} test images; {given.out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
