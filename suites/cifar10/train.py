"""Train the class-conditional DDPM that `full.toml` is about. **Not yet run with real data.**

    python -m suites.cifar10.train --data cifar-10-batches-bin [--out .weights/cifar10-ddpm] [--device cuda] [--steps N]
    python -m suites.cifar10.train --data cifar-10-batches-bin --pictures .weights/cifar10-pictures    (trains nothing)

The data is the binary version of CIFAR-10 (cifar-10-binary.tar.gz of Krizhevsky's page), unpacked by the user: nothing is fetched, and no pickle is opened.

The recipe is that of the code which SalUn, SFRon and DiMUM share, as far as it is published: 128 channels times 1, 2, 2, 2, two blocks a level,
attention at 16 pixels, dropout .1, the null label in .1 of the draws, 1000 steps of a straight line of betas, Adam at 2e-4, batch 128, gradient norm 1,
averaged weights with .9999, 1M steps (arXiv 2512.03564, section VI-A). Differs from it: diffusers' UNet; warm-up and flips are not stated, there are none.
The pictures are the first 500 of each class in the training set, which is what that code holds FID and sFID against.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor

from harness.errors import ResurgenceError, SpecError
from harness.pocket import ddpm

FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))  # the training set; 10,000 images each
TEST = ("test_batch.bin",)  # as many as one of them
ROW = 1 + 3 * 32 * 32  # bytes: a label, then the three colours of an image
NAMES = "batches.meta.txt"
EACH = 500  # pictures of each class
RECIPE = ddpm.Recipe(steps=1_000_000, batch=128, rate=2e-4, warm=1, decay=0.9999, falls=False, optimiser=torch.optim.Adam)


def read(folder: Path, files: Sequence[str] = FILES) -> tuple[Tensor, Tensor]:
    """uint8 images (n, 3, 32, 32) of some files, by default the training set's, and their labels (n,)."""
    if lacking := [name for name in (*files, NAMES) if not (folder / name).is_file()]:
        raise SpecError(f"no {lacking[0]} in '{folder}'; unpack the binary version of CIFAR-10 (cifar-10-binary.tar.gz) there: {', '.join(files)} and {NAMES}")
    names = tuple((folder / NAMES).read_text(encoding="ascii").split())
    if names != ddpm.CLASSES:
        raise SpecError(f"{NAMES} in '{folder}' names {', '.join(names)}; CIFAR-10's classes are {', '.join(ddpm.CLASSES)}")
    rows = np.concatenate([_rows(folder / name) for name in files])
    return torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32).copy()), torch.from_numpy(rows[:, 0].astype(np.int64))


def _rows(file: Path) -> np.ndarray:
    raw = np.fromfile(file, dtype=np.uint8)
    if not raw.size or raw.size % ROW or raw[::ROW].max() >= len(ddpm.CLASSES):
        raise SpecError(f"'{file}' holds {raw.size} bytes that are no rows of a label below {len(ddpm.CLASSES)} and {ROW - 1} pixels; unpack it again")
    return raw.reshape(-1, ROW)


def write(images: Tensor, truth: Tensor, out: Path) -> None:
    """The first pictures of each class as PNG, in a folder that has its name."""
    for at, name in enumerate(ddpm.CLASSES):
        (out / name).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images[truth == at][:EACH]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / name / f"{i:03d}.png")


def build() -> UNet2DModel:
    """The published UNet in diffusers' classes, 38 M parameters."""
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        dropout=0.1,
        num_class_embeds=len(ddpm.CLASSES) + 1,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, then train and save or only write pictures; 2 if the data is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the unpacked cifar-10-batches-bin")
    parser.add_argument("--out", type=Path, default=Path(".weights/cifar10-ddpm"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--pictures", type=Path, help="write the first pictures of each class there instead of training")
    given = parser.parse_args(arguments)
    try:
        images, truth = read(given.data)
    except ResurgenceError as error:
        print(error, file=sys.stderr)
        return 2
    if given.pictures:
        write(images, truth, given.pictures)
        print(f"the first {EACH} pictures of each class are in {given.pictures}")
        return 0
    print(f"{len(images)} pictures of {len(ddpm.CLASSES)} classes; this recipe was not yet run with real data", flush=True)
    torch.manual_seed(ddpm.SEED)
    unet = ddpm.learn(build(), images, truth, dataclasses.replace(RECIPE, steps=given.steps), torch.device(given.device))
    ddpm.save(unet, given.out, torch.float32)
    return 0


if __name__ == "__main__":
    sys.exit(main())
