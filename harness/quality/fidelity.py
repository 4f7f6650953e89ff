"""FID, sFID and KID of images against a reference, through torch-fidelity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.datasets import ImagesPathDataset, TransformPILtoRGBTensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset
from torchvision.transforms import CenterCrop, Compose, Resize

from harness.errors import SpecError, StoreError
from harness.quality._figure import Figure
from harness.quality.features import Backbone
from harness.spec import BLOCKS
from harness.taskfile import pictures_in

SUBSETS, LARGEST = 100, 1000  # KID: how many subsets, and of how many images at most
SEED = 2020  # of KID's subsets; torch-fidelity's default
CUT = "reference's shorter side to that of the images and centre crop, then "  # what files are put through before `resize`
NEEDS = "a quality figure needs at least 2 uint8 images (n, 3, h, w)"
Sets = Tensor | Iterable[Tensor]  # all images, or one set after the other: more than fit into memory


class Images(Dataset[Tensor]):
    """uint8 images (n, 3, h, w) one by one."""

    def __init__(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise SpecError(f"{NEEDS}, got {images.dtype} {tuple(images.shape)}")
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def fidelity(images: Sets, reference: Sets | Path | list[Path], says: str, backbone: Backbone, weights: Path | None = None, batch: int = 64) -> list[Figure]:
    """FID, sFID and KID of uint8 images (n, 3, h, w) against other such images, or those in a folder or in files (square-cropped to the same size).

    `says` names the reference in every figure. `weights` is the folder with Inception's weights; the pocket backbone has its own.
    FID is biased by the number of images: compare figures of equal counts only. Its spread, and sFID's, is the standard error by leaving
    out one tenth of `images` after the other (Tukey's jackknife), where there are enough.
    """
    if isinstance(reference, Path):
        reference = _files(reference)
    layers = [backbone.layer, backbone.spatial]
    cuda = torch.cuda.is_available()
    path = None if weights is None else str(weights)
    extractor = create_feature_extractor(backbone.name, layers, cuda=cuda, feature_extractor_weights_path=path, verbose=False)

    def look(pictures: Dataset[Tensor]) -> dict[str, Tensor]:
        return get_featuresdict_from_dataset(pictures, extractor, batch, cuda, True, False)

    mine, size = _together(images, look)
    other = look(_cut(reference, size)) if isinstance(reference, list) else _together(reference, look)[0]
    count, against = len(mine[layers[0]]), len(other[layers[0]])
    cut = CUT if isinstance(reference, list) else ""

    def figure(name: str, value: float, layer: str, spread: float | None = None) -> Figure:
        conditions = (f"{backbone.says}, layer {layer}", mine[layer].shape[1], f"{against} images: {says}", count, cut + backbone.resize)
        return Figure(name, value, *conditions, spread)

    found = [
        figure(name, _frechet(mine[layer], other[layer]), layer, _error(mine[layer], other[layer])) for name, layer in zip(("FID", "sFID"), layers, strict=True)
    ]
    subset = min(LARGEST, count, against)
    kid = kid_features_to_metric(mine[layers[0]], other[layers[0]], kid_subsets=SUBSETS, kid_subset_size=subset, rng_seed=SEED, verbose=False)
    return [*found, figure(f"KID ({SUBSETS} subsets of {subset})", kid[KEY_METRIC_KID_MEAN], layers[0], kid[KEY_METRIC_KID_STD])]


def _together(images: Sets, look: Callable[[Dataset[Tensor]], dict[str, Tensor]]) -> tuple[dict[str, Tensor], int]:
    """The features of all sets, layer by layer, and the width of an image."""
    seen, size = [], 0
    for each in [images] if isinstance(images, Tensor) else images:
        seen.append(look(Images(each)))
        size = each.shape[-1]
    found = {layer: torch.cat([part[layer] for part in seen]) for layer in seen[0]}
    if (count := len(next(iter(found.values())))) < 2:
        raise SpecError(f"{NEEDS}, got {count}")
    return found, size


def _frechet(a: Tensor, b: Tensor) -> float:
    return float(fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False)[KEY_METRIC_FID])


def _error(a: Tensor, b: Tensor) -> float | None:
    """Jackknife standard error of the distance over `a`. A tenth in a row is left out at a time: rows come round by round, so no part is of one concept."""
    if len(a) < 2 * BLOCKS:
        return None
    part = torch.arange(len(a)) * BLOCKS // len(a)
    left = torch.tensor([_frechet(a[part != block], b) for block in range(BLOCKS)], dtype=torch.float64)
    return float(((BLOCKS - 1) * left.var(correction=0)).sqrt())


def _files(folder: Path) -> list[Path]:
    """PNG and JPEG files of a folder and its subfolders; an error where there are none, before anything is drawn."""
    if not (files := pictures_in(folder)):
        raise StoreError(f"no PNG or JPEG images in '{folder}'; the reference must be a folder of images")
    return files


def _cut(files: list[Path], size: int) -> Any:
    """The shorter side resized to `size` and the middle cut out."""
    return ImagesPathDataset(files, Compose([Resize(size), CenterCrop(size), TransformPILtoRGBTensor()]))
