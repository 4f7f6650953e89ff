"""A model that somebody brings, as one more stage after its parent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from harness import hub, pipeline, single_file
from harness.errors import StoreError
from harness.families.class_conditional import CLASSES
from harness.pipeline import PICKLES, ClassConditional, Pipe, StableDiffusion, StableDiffusionXL
from harness.spec import Base, ImageSet, sha256
from harness.training import Run

PARTS = {
    "UNet2DConditionModel": ("unet", UNet2DConditionModel),
    "UNet2DModel": ("unet", UNet2DModel),
    "AutoencoderKL": ("vae", AutoencoderKL),
}


@dataclass(frozen=True)
class Candidate:
    """Weights from `path`: a model's folder, a UNet folder, a .safetensors file with a delta, a LoRA or a whole model, or a hub id of one of these.

    A delta names tensors as `unet.<name>`, `text_encoder.<name>`, `vae.<name>` or, for the UNet, bare; a file in the layout of Stable
    Diffusion's original code is read by its parent's configuration. Its address is the content, or hub id and commit. A safety checker
    and a scheduler that come along are not used: the task decides those.
    """

    digest: str
    path: str = field(metadata={"address": False})
    seed: int = 0

    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("text-to-image", "class-conditional")
    trains: ClassVar[str] = "all"
    reads: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def at(cls, path: str) -> Candidate:
        """The candidate at `path`, its digest taken."""
        place = Path(path)
        if place.suffix in PICKLES:
            raise StoreError(f"'{path}' is a pickle, which can run code when opened; save it as .safetensors")
        if not place.exists():
            if not hub.named(path):
                raise StoreError(
                    f"'{path}' does not exist; a candidate is a .safetensors file, a diffusers folder, a UNet folder, or a hub id such as owner/name"
                )
            return cls(f"{path.partition('@')[0]}@{hub.snapshot(path).name}", path)
        if place.is_file() and place.suffix != ".safetensors":
            raise StoreError(f"'{path}' is no .safetensors file; a candidate is that, a diffusers folder or a UNet folder")
        return cls(pipeline.folder_digest(place) if place.is_dir() else sha256(place), path)

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """None."""
        return {}

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Overwrite the weights, after checking every name, shape and value."""
        place = Path(self.path) if Path(self.path).exists() else _only(hub.snapshot(self.path), self.path)
        tensors = _folder(place, str(place), pipe) if place.is_dir() else _file(place, pipe)
        if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
            raise StoreError(f"the candidate's '{broken[0]}' holds NaN or infinite values; {len(broken)} such tensors in '{self.path}'")
        pipe.apply(tensors)


def _only(folder: Path, source: str) -> Path:
    """The folder of a pipeline or a UNet, or the one file of a delta or LoRA."""
    if any((folder / name).is_file() for name in ("model_index.json", "config.json", CLASSES)):
        return folder
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise StoreError(
            f"'{source}' holds {len(found)} .safetensors files ({', '.join(p.name for p in found) or 'none'}); fetch the one you mean and give its path"
        )
    return found[0]


def _folder(place: Path, path: str, pipe: Pipe) -> dict[str, Tensor]:
    """The tensors of a whole model, or of a UNet alone."""
    if any((place / name).is_file() for name in ("model_index.json", CLASSES)):
        other = pipeline.load(Base("", path))
        if isinstance(other, ClassConditional) and isinstance(pipe, ClassConditional) and other.classes != pipe.classes:
            raise StoreError(f"'{path}' has the classes {', '.join(other.classes)}; its parent's are, in this order: {', '.join(pipe.classes)}")
        return {name: p.detach() for name, p in other.named().items()}
    try:
        kind = json.loads((place / "config.json").read_text(encoding="utf-8"))["_class_name"]
        part, cls = PARTS[kind]
        model = cls.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
        if lacking := [name for name, p in model.named_parameters() if p.is_meta]:
            raise ValueError(f"it lacks {lacking[0]} and {len(lacking) - 1} more")
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"'{path}' is neither a diffusers pipeline nor a UNet folder: {error}") from error
    return {f"{part}.{name}": p.detach() for name, p in model.named_parameters()}


def _file(place: Path, pipe: Pipe) -> dict[str, Tensor]:
    """The tensors of a delta, or what a LoRA amounts to when it is merged."""
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(place).items()}
    except SafetensorError as error:
        raise StoreError(f"'{place}' is not a readable .safetensors file: {error}") from error
    if not tensors:
        raise StoreError(f"'{place}' holds no tensors")
    if any("lora" in name.lower() for name in tensors):
        if not isinstance(pipe, StableDiffusion):
            raise StoreError(f"'{place}' is a LoRA, which is read for text-to-image models only; merge it and save the weights")
        return _merged(place, pipe)
    if single_file.original(tensors):
        return single_file.converted(tensors, pipe)
    named, parts = pipe.named(), tuple(f"{part}." for part in pipe.components)
    full = {name if name.startswith(parts) else f"unet.{name}": tensor for name, tensor in tensors.items()}
    shorter = {name: name.replace(".text_model.", ".", 1) for name in full}  # a level of names that transformers dropped
    return {short if name not in named and (short := shorter[name]) in named else name: tensor for name, tensor in full.items()}


class _Copy:
    """A copy of our UNet and text encoders for diffusers to put a LoRA into: ours stay as they are."""

    hf_device_map = None  # diffusers asks for it

    def __init__(self, pipe: StableDiffusion) -> None:
        self.components = {"unet": UNet2DConditionModel.from_config(pipe.unet.config)}
        self.components |= {part: type(getattr(pipe, part))(getattr(pipe, part).config) for part in pipe.encoders}
        for part, model in self.components.items():
            model.load_state_dict(getattr(pipe, part).state_dict())
            setattr(self, part, model)

    def named(self) -> dict[str, Tensor]:
        """Every parameter by its full name."""
        return {f"{part}.{name}": p.detach() for part, model in self.components.items() for name, p in model.named_parameters()}


class _Loader(_Copy, StableDiffusionLoraLoaderMixin):  # type: ignore[misc]  # diffusers is not typed
    """With one text encoder."""


class _LoaderXL(_Copy, StableDiffusionXLLoraLoaderMixin):  # type: ignore[misc]
    """With two."""


def _merged(place: Path, pipe: StableDiffusion) -> dict[str, Tensor]:
    loader: Any = (_LoaderXL if isinstance(pipe, StableDiffusionXL) else _Loader)(pipe)
    before = pipe.named()
    where: dict[str, Any] = {"weight_name": place.name, "local_files_only": True}  # the file's metadata hold alpha: a dictionary would lose them
    try:
        given, _ = loader.lora_state_dict(str(place.absolute().parent), unet_config=pipe.unet.config, **where)
        loader.load_lora_weights(str(place.absolute().parent), **where)
        for model in loader.components.values():
            model.float()
        fitting = sum(".lora_" in name for name in loader.named())
        loader.fuse_lora(components=list(loader.components))
        loader.unload_lora_weights()
    except (ValueError, RuntimeError, KeyError) as error:
        raise StoreError(f"the LoRA '{place}' does not fit this model: {error}") from error
    if fitting < len(given):
        raise StoreError(f"only {fitting} of the {len(given)} tensors of the LoRA '{place}' match this model; was it trained for another architecture?")
    return {name: p for name, p in loader.named().items() if not torch.equal(p, before[name].cpu())}
