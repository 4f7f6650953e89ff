"""What a device must hold at once while a stage runs, told from the shapes of the model's tensors: nothing is loaded.

The model; every weight that an earlier stage moved, as it was loaded, and what this stage trains, as it found it; Adam's two moments
of what learns; and then either what the forward pass keeps for the backward pass, or what that one makes of it, the
gradient: as the one is used up, the other grows, so the larger of the two is held and never both. All in float32.

Left out, because it passes within one layer: what a layer computes with. Of a loss that takes several passes before it looks
back, one is counted. Micro-batches and recomputation make it less. An allocator that keeps what is freed makes it more: glibc's up to
a third, by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

from harness.groups import group
from harness.spec import Lineage

FLOAT = 4  # bytes
Shapes = Mapping[str, tuple[int, ...]]

_BLOCK = re.compile(r"unet\.(down|up)_blocks\.(\d+)\.")
_CONTEXT = re.compile(r"text_encoder\.(text_model\.)?embeddings\.position_embedding\.weight")


def peak(lineage: Lineage, shapes: Shapes, latent: tuple[int, int]) -> int:
    """Bytes while the last stage of `lineage` runs, in a model of these tensors and this size (height, width) of a latent."""
    stage = lineage.stages[-1]
    earlier = {name for each in lineage.stages[:-1] for name in moved(each, shapes)}
    learns = learning(stage, shapes)
    copies = count(shapes, earlier) + (0 if adapts(stage) else count(shapes, moved(stage, shapes)))
    passing = (getattr(stage, "batch", 0) or getattr(stage, "lora_batch", 0)) * activations(shapes, latent)
    return FLOAT * (count(shapes, shapes) + copies + 2 * learns + max(learns, passing))


def adapts(stage: Any) -> bool:
    """Whether a stage leaves an adapter, and the weights alone."""
    return hasattr(stage, "merged")


def moved(stage: Any, shapes: Shapes) -> set[str]:
    """The names of the weights that are others after the stage; those that its adapter is merged into."""
    if not adapts(stage):
        return {name for name in shapes if group(stage.trains)(name)}
    ends = tuple(f".{target}.weight" for target in stage.targets.split(","))
    return {name for name in shapes if name.startswith("unet.") and name.endswith(ends)}


def learning(stage: Any, shapes: Shapes) -> int:
    """How many parameters the optimizer holds: a group, or `rank` rows and columns of an adapter for every matrix; none of a closed form."""
    if adapts(stage):
        return sum(stage.rank * sum(shapes[name][:2]) for name in moved(stage, shapes))
    return count(shapes, moved(stage, shapes)) if hasattr(stage, "steps") else 0


def activations(shapes: Shapes, latent: tuple[int, int]) -> int:
    """Numbers that one sample's forward pass keeps for the backward pass, as if all of the UNet learned.

    Every operation keeps what it needs of its input: a norm, a projection or convolution, a non-linearity and a product all of it.
    """
    context = next((shape[0] for name, shape in shapes.items() if _CONTEXT.fullmatch(name)), 0)
    levels = 1 + max((int(found[2]) for name in shapes if (found := _BLOCK.match(name))), default=0)
    total = 0
    for name, shape in shapes.items():
        if name.startswith("unet.") and name.endswith(".weight"):
            places = prod(latent) / 4 ** _level(name, levels)
            total += round(sum(width * (context if of_text else places) for width, of_text in _kept(name.removesuffix(".weight"), shape)))
    return total


def _kept(name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, bool]]:
    """Width of each thing kept by the operations around one weight; and whether it has the prompt's positions, and not the latent's."""
    if "norm" in name.rpartition(".")[2]:
        yield 2 * shape[0], False  # what it is given, and what comes of it: the next layer's input
        if ".resnets." in name or name.endswith("conv_norm_out"):
            yield shape[0], False  # and that through SiLU
    elif name.endswith((".to_q", ".to_k", ".to_v")):
        yield shape[0], ".attn2." in name and not name.endswith(".to_q")
    elif name.endswith((".to_out.0", ".proj_out")) or ".downsamplers." in name or ".upsamplers." in name:
        yield shape[1], False
    elif name.endswith(".ff.net.0.proj"):  # GEGLU: both halves; the gate through GELU, and the product
        yield 2 * shape[0], False


def _level(name: str, levels: int) -> int:
    """How often the latent was halved where a layer of the UNet reads: not at all at its ends, most in the middle."""
    if (found := _BLOCK.match(name)) is None:
        return levels - 1 if name.startswith("unet.mid_block.") else 0
    depth = int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])
    return depth - (".upsamplers." in name)  # which doubles first


def count(shapes: Shapes, names: Iterable[str]) -> int:
    """How many numbers these tensors hold."""
    return sum(prod(shapes[name]) for name in names)
