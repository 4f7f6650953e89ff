"""The front door to models: find one, load it as the family it is, denoise with it.

`source` is `pocket` (ships with the project), `pocket-ddpm` (its recipe does), a folder, or a hub id with an optional `@revision`.
A folder is of the Stable Diffusion 1.x / 2.x layout (diffusers') or a class-conditional DDPM (`unet/`, `scheduler/`,
`classes.json`). Only safetensors are read: other formats can run code when opened.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from harness import pocket
from harness.errors import SpecError, StoreError
from harness.families.class_conditional import CLASSES, ClassConditional
from harness.families.pipe import Pipe
from harness.families.stable_diffusion import StableDiffusion
from harness.groups import ALIASES, GROUPS, group
from harness.spec import Base, Sampler, key, sha256

__all__ = [
    "ALIASES", "COMPONENTS", "GROUPS", "PICKLES", "ClassConditional", "Pipe", "StableDiffusion",
    "denoise", "family", "folder_digest", "group", "identify", "load",
]  # fmt: skip

COMPONENTS = StableDiffusion.components
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
SHIPPED = {"pocket": pocket.MODEL, "pocket-ddpm": pocket.DDPM}


def denoise(pipe: Pipe, x_T: Tensor, cond: Tensor, uncond: Tensor, sampler: Sampler, stop: int | None = None) -> tuple[Tensor, Tensor]:
    """DDIM (eta 0) with classifier-free guidance from noise `x_T` through the first `stop` of the sampler's steps.

    Returns (x_t, t): the latents and the timestep they are at; all steps give x_0 and t = 0.
    """
    scheduler = pipe.scheduler()
    scheduler.set_timesteps(sampler.steps)
    timesteps = scheduler.timesteps.to(pipe.device)
    stop = len(timesteps) if stop is None else stop
    x = x_T * scheduler.init_noise_sigma
    both = torch.cat([uncond, cond])
    with torch.no_grad():
        for t in timesteps[:stop]:
            if sampler.guidance == 1:
                out = pipe.predict(x, t, cond)
            else:
                null, out = pipe.predict(torch.cat([x, x]), t, both).chunk(2)
                out = null + sampler.guidance * (out - null)
            x = scheduler.step(out, t, x).prev_sample
    return x, timesteps[stop] if stop < len(timesteps) else torch.zeros_like(timesteps[0])


# --- loading -----------------------------------------------------------------------------------------------------


def identify(source: str) -> Base:
    """Find a model and take its address: the digest of its files, or hub id and commit."""
    folder = SHIPPED.get(source, Path(source))
    if folder.is_dir():
        return Base(digest=folder_digest(folder), source=source)
    if source in SHIPPED:
        raise SpecError(f"'{source}' has no weights here yet; make them with the recipe in {folder.parent / 'README.md'}")
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise SpecError(f"no model '{source}': neither 'pocket', nor a folder, nor a hub id such as 'owner/name@revision'")
    path = _download(source)
    return Base(digest=f"{source.partition('@')[0]}@{path.name}", source=source)


def folder_digest(folder: Path) -> str:
    """Digest of the weights, configurations and tokenizer files in a model folder; a card is about them."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt") and p.name != "card.json")
    if not any(p.suffix == ".safetensors" for p in files):
        found = sorted({p.name for p in folder.rglob("*") if p.suffix in PICKLES})
        why = f"only {found[0]}, a format that can run code when opened" if found else "no weights"
        raise StoreError(f"'{folder}' holds {why}; save it with `save_pretrained(..., safe_serialization=True)`")
    return key([[p.relative_to(folder).as_posix(), sha256(p)] for p in files])


def _download(source: str) -> Path:
    """Local snapshot of a hub repository at a commit. Honours HF_HUB_OFFLINE."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        wanted = ["*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SpecError(f"cannot fetch the model '{source}': {error}. Give a local diffusers folder instead") from error


def _folder(source: str) -> Path:
    folder = SHIPPED.get(source, Path(source))
    return folder if folder.is_dir() else _download(source)


@cache
def family(base: Base) -> str:
    """The family that a model is of, without loading it."""
    return _kind(_folder(base.source)).family


def _kind(folder: Path) -> type[StableDiffusion | ClassConditional]:
    """The family's class, by the layout of the folder."""
    try:
        kind = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None  # to be told when it is loaded
    return ClassConditional if kind == "UNet2DModel" or (folder / CLASSES).is_file() else StableDiffusion


def load(base: Base) -> Pipe:
    """The model in float32, on the worker's GPU if it has one."""
    from diffusers.utils.logging import disable_progress_bar as quiet_diffusers  # here: a run that only reads the store need not load it
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_diffusers()
    quiet_transformers()
    folder = _folder(base.source)
    kind = _kind(folder)
    plain = any(".fp16" not in path.name for path in (folder / "unet").glob("*.safetensors"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return kind.load(folder, base.source, device, None if plain else "fp16")
    except (SpecError, StoreError):
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"'{base.source}' does not load as a {kind.layout} pipeline: {error}") from error
