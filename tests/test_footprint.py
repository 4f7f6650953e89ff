"""What a stage holds in memory: no copy more than is needed, and an estimate that is told from shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from harness import execution, footprint
from harness.errors import StoreError
from harness.finetuning import lora
from harness.pipeline import Pipe, StableDiffusion, StableDiffusionXL, group
from harness.spec import Base, Lineage
from harness.unlearning import esd, mace, uce
from tests import tiny
from tests.test_memory import drawn

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = tiny.task()
ESD = esd.Method(steps=1, lr=1e-3, sampler_steps=1)
LORA = lora.Finetune(steps=1, batch=1, images_per_prompt=1)


@cache
def of(layout: str) -> Pipe:
    """A model of a real layout; nobody changes its weights."""
    return (StableDiffusionXL if layout == "sdxl" else StableDiffusion)(tiny.of_layout(layout), torch.device("cpu"))


def shapes(pipe: Pipe) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape by its full name."""
    return {name: tuple(p.shape) for name, p in pipe.named().items()}


def ran(pipe: Pipe, stage: Any) -> tuple[dict[str, Tensor], execution.Run]:
    """The stage at work, as the engine has it."""
    images = {name: drawn(chosen) for name, chosen in stage.images(TASK).items()}
    return execution.execute(pipe, stage, TASK.view(stage.reads), images)


# --- copies ----------------------------------------------------------------------------------------------------------


def test_what_a_stage_found_and_what_a_reset_puts_back_is_one_copy(pipe):
    """Where the model is as it was loaded; of weights that an earlier stage moved there are two, and each is the right one."""
    loaded = copy.deepcopy(pipe.named())
    _, first = ran(pipe, ESD)
    assert first.original.keys() == {name for name in loaded if group("x")(name)}
    assert all(tensor is pipe._original[name] for name, tensor in first.original.items())
    between = copy.deepcopy(pipe.named())
    _, second = ran(pipe, ESD)
    for name, tensor in second.original.items():
        assert torch.equal(tensor, between[name])
        assert torch.equal(pipe._original[name], loaded[name])
    assert any(tensor is not pipe._original[name] for name, tensor in second.original.items())
    pipe.reset()
    assert all(torch.equal(p, loaded[name]) for name, p in pipe.named().items())


def test_an_adapter_takes_no_copy_of_the_weights(pipe):
    """It leaves them alone, so there is nothing to put back; and of a gradient nothing stays either."""
    loaded = copy.deepcopy(pipe.named())
    adapter, run = ran(pipe, LORA)
    assert adapter
    assert (run.original, pipe._original) == ({}, {})
    assert all(torch.equal(p, loaded[name]) for name, p in pipe.named().items())
    ran(pipe, ESD)
    assert all(p.grad is None for p in pipe.named().values())


def test_an_adapter_that_moves_weights_is_found_out(pipe):
    """Whatever group it names: the model's own weights are not its to change."""

    @dataclass(frozen=True)
    class Careless(lora.Finetune):
        trains: ClassVar[str] = "unet"

        def __call__(self, pipe: Any, task: Any, run: Any) -> None:
            super().__call__(pipe, task, run)
            pipe.named()["unet.conv_in.bias"].data[0] += 1

    with pytest.raises(StoreError, match=r"says it leaves an adapter but it changed 'unet\.conv_in\.bias' too"):
        ran(pipe, Careless(steps=1, batch=1, images_per_prompt=1))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100])
def test_a_fingerprint_in_pieces(monkeypatch, size):
    """Every bit and its place count, across pieces too: a change, an exchange and a shift are seen."""
    monkeypatch.setattr(execution, "PIECE", 8)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    places = torch.arange(1, size + 1)
    assert execution._print(x) == int((x.view(torch.int32).long() * (places * 6364136223846793005)).sum())
    assert execution._print(x) != execution._print(x.roll(1)) or size == 1
    x[-1] = -x[-1]
    assert execution._print(x) != execution._print(-x)


# --- the estimate ----------------------------------------------------------------------------------------------------


def kept(pipe: Pipe) -> int:
    """Numbers that one sample's forward pass really keeps, weights aside, when all of the UNet learns."""
    pipe.parameters("unet")
    weights = {p.untyped_storage().data_ptr() for p in pipe.named().values()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            found[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pipe.predict(torch.randn(1, *pipe.latent_shape), torch.tensor(500), pipe.encode(["a x"]))
    pipe.unet.requires_grad_(False)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values()) // footprint.FLOAT


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_activations_are_what_autograd_keeps(layout):
    """Within a tenth, by the shapes of the weights alone: convolutions or linear layers around attention, two text encoders or one."""
    pipe = of(layout)
    found, real = footprint.activations(shapes(pipe), pipe.latent_shape[1:]), kept(pipe)
    assert found == pytest.approx(real, rel=0.1), found / real


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("conv_in", 0),
        ("down_blocks.2.downsamplers.0.conv", 2),
        ("mid_block.resnets.0.norm1", 3),
        ("up_blocks.0.resnets.0.norm1", 3),
        ("up_blocks.0.upsamplers.0.conv", 2),
        ("up_blocks.3.attentions.0.norm", 0),
        ("conv_norm_out", 0),
    ],
)
def test_how_often_the_latent_was_halved(name: str, level: int) -> None:
    """At a layer's input, in a UNet of four levels: an upsampler's convolution comes after the doubling."""
    assert footprint._level(f"unet.{name}.weight", 4) == level


def test_activations_grow_with_the_latent():
    """By places, but for what has the prompt's."""
    pipe = of("sd14")
    small, large = (footprint.activations(shapes(pipe), size) for size in ((8, 8), (16, 16)))
    assert 3.5 * small < large < 4 * small


NAMES = {
    "closed form": (lambda pipe: (uce.Method(),), lambda n: n["all"] + n["kv"]),
    "gradient": (lambda pipe: (ESD,), lambda n: n["all"] + 3 * n["x"] + max(n["x"], n["kept"])),
    "large batch": (lambda pipe: (esd.Method(batch=5),), lambda n: n["all"] + 3 * n["x"] + 5 * n["kept"]),
    "all of it": (lambda pipe: (esd.Method(trains="f"),), lambda n: n["all"] + 3 * n["unet"] + max(n["unet"], n["kept"])),
    "after another": (lambda pipe: (uce.Method(), ESD), lambda n: n["all"] + n["kv"] + 3 * n["x"] + max(n["x"], n["kept"])),
    "an adapter": (lambda pipe: (ESD, LORA), lambda n: n["all"] + n["x"] + 2 * n["lora"] + n["kept"]),
    "after an adapter": (lambda pipe: (LORA, uce.Method()), lambda n: n["all"] + n["attention"] + n["kv"]),
    "LoRAs within": (lambda pipe: (mace.Method(segmenter="whole", lora_batch=2),), lambda n: n["all"] + n["kv"] + 2 * n["kept"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_what_is_held_at_once(case: str) -> None:
    """The model, what was moved before, what is trained as it was found, two moments, and the larger of activations and gradient."""
    pipe = of("sd14")
    stages, expected = NAMES[case]
    found = shapes(pipe)
    groups: dict[str, Callable[[str], bool]] = {"all": group("all"), "unet": group("unet"), "x": group("x"), "kv": group("x-strict")}
    groups["attention"] = lambda name: name.startswith("unet.") and name.endswith(tuple(f".{each}.weight" for each in LORA.targets.split(",")))
    numbers = {name: sum(p.numel() for each, p in pipe.named().items() if belongs(each)) for name, belongs in groups.items()}
    numbers["lora"] = sum(LORA.rank * sum(found[name]) for name in found if groups["attention"](name))
    numbers["kept"] = footprint.activations(found, (8, 8))
    assert footprint.peak(Lineage(Base("d", "s"), TASK, stages(pipe)), found, (8, 8)) == 4 * expected(numbers)
