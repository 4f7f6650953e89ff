"""A whole model in one .safetensors file, with the names of Stable Diffusion's original code (`model.diffusion_model.`, ...).

Such a file holds no configuration. It stands in a folder beside the file, of the same name without `.safetensors`, as diffusers
saves it (model_index.json, unet/config.json, ..., tokenizer/, scheduler/; no weights); failing that, it is that of the hub's SD 1.5 or SDXL.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.errors import SpecError, StoreError
from harness.hub import SETTINGS, download
from harness.spec import key, sha256

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXTS = {"text_encoder": ("cond_stage_model.", "conditioner.embedders.0."), "text_encoder_2": ("conditioner.embedders.1.",)}
KNOWN = {"v1": "stable-diffusion-v1-5/stable-diffusion-v1-5", "xl_base": "stabilityai/stable-diffusion-xl-base-1.0"}


def original(names: Any) -> bool:
    """Whether tensors have the original code's names."""
    return any(name.startswith((UNET, VAE, *(prefix for each in TEXTS.values() for prefix in each))) for name in names)


@cache
def settings(file: Path) -> Path:
    """The folder with the configuration of a file's model."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    if file.suffix != ".safetensors":
        raise SpecError(f"'{file}' is no .safetensors file; a model is that, a diffusers folder or a hub id")
    shapes = _shapes(file)
    if not all(any(name.startswith(prefix) for name in shapes) for prefix in (UNET, VAE)):
        raise SpecError(f"'{file}' is no whole model (it needs {UNET}* and {VAE}*); give the model it belongs to, and a UNet, delta or LoRA as --candidate")
    beside = file.with_suffix("")
    if beside.is_dir():
        return beside
    needed = f"put its diffusers configuration (model_index.json, unet/config.json, ..., tokenizer/, scheduler/; no weights) into '{beside}/'"
    kind = infer_diffusers_model_type(shapes)
    if kind not in KNOWN or "v_pred" in shapes:
        told = "SD 2.x: noise and v-prediction look the same in it" if kind == "v2" else "v-prediction" if "v_pred" in shapes else kind
        raise SpecError(f"'{file}' does not say how its model is used ({told}); {needed}")
    try:
        return download(KNOWN[kind], SETTINGS)
    except SpecError as error:
        raise SpecError(f"'{file}' looks like {KNOWN[kind]}, whose configuration is not here ({error}); or {needed}") from error


def address(file: Path, folder: Path) -> str:
    """Digest of a file and of the configuration it is read with."""
    files = sorted(p for pattern in SETTINGS for p in folder.glob(pattern))
    return key([sha256(file), [[p.relative_to(folder).as_posix(), sha256(p)] for p in files]])


def _shapes(file: Path) -> dict[str, Tensor]:
    """The file's tensors without their content."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: torch.empty(tensors.get_slice(name).get_shape(), device="meta") for name in tensors.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise StoreError(f"'{file}' is not a readable .safetensors file: {error}") from error


def shapes(folder: Path, encoders: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Full name and shape of every parameter that a configuration describes, without weights; `encoders` are transformers' classes by part."""
    import diffusers
    import transformers

    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    with torch.device("meta"):  # numbers without content take no memory
        parts = {name: kind.from_config(kind.load_config(folder / name)) for name, kind in kinds.items()}
        for name, of in encoders.items():
            kind = getattr(transformers, of)
            parts[name] = kind(kind.config_class.from_pretrained(folder / name))
    return {f"{name}.{each}": tuple(p.shape) for name, part in parts.items() for each, p in part.named_parameters()}


def converted(tensors: Mapping[str, Tensor], pipe: Any) -> dict[str, Tensor]:
    """The original code's tensors under this model's names, part by part."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    found: dict[str, Tensor] = {}
    if any(name.startswith(UNET) for name in tensors):
        found |= {f"unet.{name}": t for name, t in convert_ldm_unet_checkpoint(dict(tensors), config=pipe.unet.config).items()}
    if any(name.startswith(VAE) for name in tensors):
        found |= {f"vae.{name}": t for name, t in convert_ldm_vae_checkpoint(dict(tensors), config=pipe.vae.config).items()}
    for part in set(TEXTS) & set(pipe.components):
        for prefix in TEXTS[part]:
            found |= {f"{part}.{name}": t for name, t in _text({n: t for n, t in tensors.items() if n.startswith(prefix)}, prefix, getattr(pipe, part)).items()}
    return found


def _text(tensors: Mapping[str, Tensor], prefix: str, model: Any) -> dict[str, Tensor]:
    """A text encoder's: CLIP as transformers names it, or OpenCLIP."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    if any(name.startswith(f"{prefix}model.") for name in tensors):
        named = convert_open_clip_checkpoint(model, dict(tensors), prefix=f"{prefix}model.")
    else:
        named = convert_ldm_clip_checkpoint(dict(tensors))
    if not hasattr(model, "text_model"):  # transformers dropped a level of its names
        named = {name.removeprefix("text_model."): tensor for name, tensor in named.items()}
    own = dict(model.named_parameters())
    return {name: tensor for name, tensor in named.items() if name in own}  # positions and the logit scale, which are no weights of ours, are left
