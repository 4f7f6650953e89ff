"""A diffusers pipeline's weights under the names of Stable Diffusion's original code, as a single .safetensors file holds them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
HEAD = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn"}
OPEN = {
    "embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def replaced(text: str, names: dict[str, str]) -> str:
    """The first of `names` that stands at the beginning, replaced."""
    for old, new in names.items():
        if text.startswith(f"{old}."):
            return new + text.removeprefix(old)
    return text


def unet(model: Any) -> dict[str, Tensor]:
    """model.diffusion_model.*"""
    each = model.config.layers_per_block
    attentive = ["Attn" in kind for kind in model.config.up_block_types]

    def named(name: str) -> str:
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name):
            way, i, kind, j, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            side, at = ("input_blocks", (each + 1) * i + j + 1) if way == "down" else ("output_blocks", (each + 1) * i + j)
            if kind == "downsamplers":
                return f"input_blocks.{(each + 1) * (i + 1)}.0.{rest.replace('conv.', 'op.')}"
            if kind == "upsamplers":
                return f"output_blocks.{(each + 1) * i + each}.{1 + attentive[i]}.{rest}"
            return f"{side}.{at}.{0 if kind == 'resnets' else 1}.{replaced(rest, RESNET) if kind == 'resnets' else rest}"
        if found := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
            if found[1] == "attentions":
                return f"middle_block.1.{found[3]}"
            return f"middle_block.{2 * int(found[2])}.{replaced(found[3], RESNET)}"
        return replaced(name, HEAD)

    return {f"model.diffusion_model.{named(name)}": tensor for name, tensor in model.state_dict().items()}


def vae(model: Any) -> dict[str, Tensor]:
    """first_stage_model.*; its attention is made of convolutions."""
    last = len(model.config.block_out_channels) - 1

    def named(name: str) -> str:
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if found := re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.*)", name):
            side, way, i, kind, j, rest = found[1], found[2], int(found[3]), found[4], found[5], found[6]
            place = f"{side}.{way}.{i if way == 'down' else last - i}"
            return f"{place}.block.{j}.{rest}" if kind == "resnets" else f"{place}.{kind.removesuffix('rs')}.{rest}"
        if found := re.match(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
            if found[2] == "attentions":
                return f"{found[1]}.mid.attn_1.{replaced(found[4], VAE_ATTENTION)}"
            return f"{found[1]}.mid.block_{int(found[3]) + 1}.{found[4]}"
        return name

    def shaped(name: str, tensor: Tensor) -> Tensor:
        return tensor[..., None, None] if ".attentions." in name and tensor.dim() == 2 else tensor

    return {f"first_stage_model.{named(name)}": shaped(name, tensor) for name, tensor in model.state_dict().items()}


def clip(model: Any, prefix: str) -> dict[str, Tensor]:
    """CLIP's text encoder, under transformers' names."""
    return {f"{prefix}transformer.text_model.{name}": tensor for name, tensor in model.state_dict().items()}


def open_clip(model: Any, prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's: queries, keys and values in one tensor."""
    found, own = {}, {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in own.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif name in OPEN:
            found[OPEN[name]] = tensor
        elif layer := re.match(r"encoder\.layers\.(\d+)\.(.*)", name):
            rest = layer[2]
            for old, new in CLIP.items():
                rest = rest.replace(old, new)
            if joined := re.match(r"attn\.([qkv])_proj\.(weight|bias)", rest):
                if joined[1] == "q":
                    parts = [own[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
                    found[f"transformer.resblocks.{layer[1]}.attn.in_proj_{joined[2]}"] = torch.cat(parts)
            else:
                found[f"transformer.resblocks.{layer[1]}.{rest}"] = tensor
    if "text_projection" not in found:  # SD 2.x has it in the file and does not use it
        width = model.config.hidden_size
        found["text_projection"] = torch.zeros(width, width)
    return {f"{prefix}model.{name}": tensor for name, tensor in found.items()}


def tensors(layout: str, sd: Any) -> dict[str, Tensor]:
    """The whole model."""
    found = unet(sd.unet) | vae(sd.vae)
    if layout == "sdxl":
        return found | clip(sd.text_encoder, "conditioner.embedders.0.") | open_clip(sd.text_encoder_2, "conditioner.embedders.1.")
    return found | (clip if layout == "sd14" else open_clip)(sd.text_encoder, "cond_stage_model.")


def save(file: Path, layout: str, sd: Any, **more: Tensor) -> Path:
    """One file."""
    save_file({name: tensor.contiguous().clone() for name, tensor in (tensors(layout, sd) | more).items()}, file)
    return file
