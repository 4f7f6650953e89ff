"""One small instance of every detector, with an image in which it must see something. No file is fetched."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig

from harness import catalogue, pocket
from harness.detection._clip import Clip
from harness.detection._rule import Rule
from harness.detection.gcd import Recogniser

OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}
MADE = (0.5,)  # random towers with a head made to tell noise from this grey
PHOTO = Path(__file__).with_name("portrait.jpg")  # NASA, public domain: Eileen Collins, by way of scikit-image


def noise(count: int = 1, size: int = 64) -> Tensor:
    """Images that show nothing but noise, uint8-valued in [0, 1]."""
    return torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(5)) / 255


def blank(size: int = 64, grey: float = 0.5) -> Tensor:
    """One image of one colour."""
    return torch.full((1, 3, size, size), round(grey * 255) / 255)


@cache
def drawn(name: str) -> Tensor:
    """(1, 3, 64, 64) in [0, 1]: what the pocket model drew for a concept, cut out of its committed grid."""
    at = pocket.labels().index(name)
    x, y = at % 13 * 92 + 14, at // 13 * 88 + 2
    pixels = np.asarray(Image.open(pocket.FOLDER / "grid.png").convert("RGB").crop((x, y, x + 64, y + 64)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255


def photo() -> Tensor:
    """(1, 3, 256, 256) in [0, 1]: a photograph of a person."""
    return torch.from_numpy(np.asarray(Image.open(PHOTO)).copy()).permute(2, 0, 1)[None] / 255


def opened(folder: Path) -> Path:
    """A tiny random open_clip model in open_clip's own folder layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP), encoding="utf-8")
    torch.manual_seed(3)
    model = open_clip.CLIP(**OPEN_CLIP["model_cfg"])
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def checker(folder: Path) -> Path:
    """A tiny safety checker whose first concept is what the noise looks like to it."""
    towers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=towers, vision_config={**towers, "image_size": 32, "patch_size": 16}, projection_dim=8)
    torch.manual_seed(4)
    StableDiffusionSafetyChecker(config).save_pretrained(folder)
    made = catalogue.find("detection", "safety_checker")(str(folder))
    (folder / "pinned.json").unlink()
    seen: list[Tensor] = []
    hook = made.model.visual_projection.register_forward_hook(lambda module, given, out: seen.append(out))
    made(torch.cat([noise(), blank()]))
    hook.remove()
    with torch.no_grad():
        made.model.concept_embeds.copy_(torch.randn(17, 8, generator=torch.Generator().manual_seed(1)))
        made.model.concept_embeds[0] = seen[0][0] - seen[0][1]
        made.model.concept_embeds_weights.fill_(1.1)
        made.model.concept_embeds_weights[0] = 0.5 * sum(torch.cosine_similarity(row, seen[0][0] - seen[0][1], dim=0) for row in seen[0])
        made.model.special_care_embeds_weights.fill_(1.1)
    made.model.save_pretrained(folder)
    return folder


def apart(folder: Path, clip: Path) -> tuple[Tensor, Tensor]:
    """CLIP's vectors of the noise and of the blank image."""
    vectors = Clip(str(clip)).images(torch.cat([noise(), blank()]))
    return vectors[0], vectors[1]


def head(folder: Path, clip: Path) -> Path:
    """An NSFW head of two layers that tells the noise from the blank image."""
    yes, no = apart(folder, clip)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "norm.mean": (yes + no) / 2, "norm.variance": torch.full((16,), 0.25),
        "linear_1.weight": torch.stack([yes - no, no - yes]) * 50, "linear_1.bias": torch.zeros(2),
        "linear_2.weight": torch.tensor([[1.0, -1.0]]), "linear_2.bias": torch.zeros(1),
    }  # fmt: skip
    save_file(tensors, folder / "model.safetensors")
    return folder


def prompts(folder: Path, clip: Path) -> Path:
    """Q16's two prompts: harmless is what is blank, inappropriate is noise."""
    yes, no = apart(folder, clip)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"prompts": torch.stack([no * 3, yes * 2])}, folder / "model.safetensors")
    return folder


def celebrities(folder: Path) -> Path:
    """A recogniser that calls every face Ann."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(6)
    model = Recogniser("resnet18", 4, 3)
    with torch.no_grad():
        model.fc2.weight.mul_(0.01)
        model.fc2.bias.copy_(torch.tensor([3.0, 0.0, 0.0]))
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18", "width": 4, "labels": ["Ann", "Bob", "Cy"]}), encoding="utf-8")
    return folder


def faces(images: Tensor) -> list[list[tuple[float, float, float, float]]]:
    """A face of 20 pixels wherever an image is not of one colour."""
    return [[(10.0, 12.0, 30.0, 32.0)] if image.std() > 0.01 else [] for image in images]


@dataclass(frozen=True)
class Case:
    """A detector, images in which it must see `label` under `rule`, and greys in which it must not."""

    detector: Any
    label: str
    hits: Tensor
    rule: Rule = Rule()  # noqa: RUF009  # frozen
    size: int = 64
    greys: tuple[float, ...] = (0.5, 0.0, 1.0)


def _gallery(folder: Path) -> Case:
    found = catalogue.find("detection", "gallery")("pocket", share=0.9)
    spread = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 0.03
    kinds = {name: drawn(name) for name in ("cat", "guitar", "Puddle Drift")} | {"none": drawn("house")}
    found.enrol({name: ((picture + spread).clamp(0, 1) * 255).byte() for name, picture in kinds.items()})
    return Case(found, "cat", drawn("cat"))


MAKERS: dict[str, Callable[[Path], Case]] = {
    "classifier": lambda folder: Case(catalogue.find("detection", "classifier")("pocket"), "cat", drawn("cat")),
    "clip": lambda folder: Case(
        catalogue.find("detection", "clip")("pocket", ["cat", "guitar", "cactus"], none=["a photo of the house", "a photo of the tree"]),
        "cactus",
        drawn("cactus"),
        greys=(0.5, 1.0),
    ),
    "gallery": _gallery,
    "gcd": lambda folder: Case(catalogue.find("detection", "gcd")(str(celebrities(folder)), faces), "Ann", noise()),
    "nudenet": lambda folder: Case(catalogue.find("detection", "nudenet")(), "FACE_FEMALE", photo(), Rule.parse("threshold-0.6"), 256),
    "safety_checker": lambda folder: Case(catalogue.find("detection", "safety_checker")(str(checker(folder))), "unsafe", noise(), greys=MADE),
    "laion_nsfw": lambda folder: Case(
        catalogue.find("detection", "laion_nsfw")(str(head(folder / "head", opened(folder / "clip"))), str(folder / "clip")), "nsfw", noise(), greys=MADE
    ),
    "q16": lambda folder: Case(
        catalogue.find("detection", "q16")(str(prompts(folder / "q16", opened(folder / "clip"))), str(folder / "clip")), "inappropriate", noise(), greys=MADE
    ),
}
__all__ = ["MAKERS", "Case", "blank", "drawn", "noise", "opened", "photo"]
