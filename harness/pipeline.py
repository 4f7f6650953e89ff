"""The front door to models: find one, load it as the family it is, denoise with it.

`source` is `pocket` (ships with the project), `pocket-ddpm` (its recipe does), a folder, a `.safetensors` file with a whole model in
the layout of Stable Diffusion's original code, or a hub id with an optional `@revision`. A folder is of the Stable Diffusion 1.x / 2.x or
XL layout (diffusers') or a class-conditional DDPM (`unet/`, `scheduler/`, `classes.json`). Only safetensors are read: other formats can
run code when opened. Nothing is fetched where `HF_HUB_OFFLINE` is set.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from harness import devices, pocket, single_file
from harness.errors import SpecError, StoreError, unknown
from harness.families.class_conditional import CLASSES, ClassConditional
from harness.families.pipe import Pipe
from harness.families.sdxl import StableDiffusionXL
from harness.families.stable_diffusion import StableDiffusion
from harness.groups import ALIASES, GROUPS, group
from harness.hub import download
from harness.spec import Base, Sampler, key, sha256

__all__ = [
    "ALIASES", "COMPONENTS", "GROUPS", "PICKLES", "ClassConditional", "Pipe", "StableDiffusion", "StableDiffusionXL",
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


def identify(source: str, precision: str | None = None) -> Base:
    """Find a model and take its address: the digest of its files, or hub id and commit; and `+` what it computes in, where not float32.

    It computes in `precision`, or in what is usual on this machine; a model that ships with the project in float32.
    """
    if source in SHIPPED and not SHIPPED[source].is_dir():
        raise SpecError(f"'{source}' has no weights here yet; make them with the recipe in {SHIPPED[source].parent / 'README.md'}")
    exact = "float32" if source in SHIPPED else precision or devices.precision()
    return Base(_address(source) + (f"+{exact}" if exact != "float32" else ""), source)


def precision_of(base: Base) -> str:
    """What a model computes in, by its address."""
    name = base.digest.partition("+")[2] or "float32"
    if name not in devices.DTYPES:
        raise unknown(f"precision in the address of '{base.source}'", name, devices.DTYPES)
    return name


def _address(source: str) -> str:
    path = SHIPPED.get(source, Path(source))
    if path.is_dir():
        if not (path / "unet").is_dir() and (path / "config.json").is_file():
            raise SpecError(f"'{source}' is one part of a model; give the whole model it belongs to, and this as --candidate")
        return folder_digest(path)
    if path.suffix in PICKLES:
        raise SpecError(f"'{source}' is a pickle, which can run code when opened; save it as .safetensors")
    if path.is_file():
        return single_file.address(path, _settings(source))
    if source.startswith((".", "/", "~")) or source.partition("@")[0].count("/") != 1:
        raise SpecError(f"no model '{source}': neither 'pocket', nor a folder, nor a .safetensors file, nor a hub id such as 'owner/name@revision'")
    return f"{source.partition('@')[0]}@{download(source).name}"


def folder_digest(folder: Path) -> str:
    """Digest of the weights, configurations and tokenizer files in a model folder; a card is about them."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt") and p.name != "card.json")
    if not any(p.suffix == ".safetensors" for p in files):
        found = sorted({p.name for p in folder.rglob("*") if p.suffix in PICKLES})
        why = f"only {found[0]}, a format that can run code when opened" if found else "no weights"
        raise StoreError(f"'{folder}' holds {why}; save it with `save_pretrained(..., safe_serialization=True)`")
    return key([[p.relative_to(folder).as_posix(), sha256(p)] for p in files])


def _settings(source: str) -> Path:
    """The folder with a model's configurations; with its weights too, unless the source is a file."""
    path = SHIPPED.get(source, Path(source))
    if path.is_dir():
        return path
    return single_file.settings(path) if path.is_file() else download(source)


@cache
def family(base: Base) -> str:
    """The family that a model is of, without loading it."""
    return kind_of(_settings(base.source)).family


def kind_of(folder: Path) -> type[StableDiffusion | ClassConditional]:
    """The family's class, by the layout of a folder, which need not hold weights."""
    try:
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        kind, told = config["_class_name"], config.get("addition_embed_type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        kind = told = None  # to be told when it is loaded
    if kind == "UNet2DModel" or (folder / CLASSES).is_file():
        return ClassConditional
    return StableDiffusionXL if told == "text_time" or (folder / "text_encoder_2").is_dir() else StableDiffusion


def load(base: Base) -> Pipe:
    """The model, its weights in float32, on the worker's GPU if it has one. What it computes in is said by its address."""
    from diffusers.utils.logging import disable_progress_bar as quiet_diffusers  # here: a run that only reads the store need not load it
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_diffusers()
    quiet_transformers()
    settings, file = _settings(base.source), Path(base.source)
    kind = kind_of(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if file.is_file() and issubclass(kind, StableDiffusion):
            pipe: Pipe = kind.load_file(file, settings, base.source, device)
        else:
            plain = any(".fp16" not in path.name for path in (settings / "unet").glob("*.safetensors"))
            pipe = kind.load(settings, base.source, device, None if plain else "fp16")
    except (SpecError, StoreError):
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"'{base.source}' does not load as a {kind.layout} pipeline: {error}") from error
    pipe.dtype = devices.DTYPES[precision_of(base)]
    pipe.micro_batch = devices.micro_batch()
    if devices.checkpointing():
        pipe.unet.enable_gradient_checkpointing()
    return pipe
