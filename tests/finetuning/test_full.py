"""Full fine-tuning: every weight of the named group learns, on benign images, and nothing else moves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from harness.data import Captioned
from harness.errors import SpecError
from harness.finetuning.full import Finetune
from harness.pipeline import group
from harness.spec import Group, Task
from harness.training import train
from tests import tiny
from tests.unlearning import _small as small

QUICK = Finetune(steps=3, lr=1e-3, batch=2, images_per_prompt=1)


@pytest.mark.parametrize("trains", ["unet", "x", "unet.noxattn"])
def test_every_weight_of_the_group_moves_and_no_other(trains: str) -> None:
    """The UNet by default; the text encoder and the VAE stay bit for bit."""
    before = small.weights(small.pipe())
    model, _ = small.after(replace(QUICK, trains=trains))
    assert small.moved(before, small.weights(model)) == {name for name in before if group(trains)(name)}


def test_it_is_ordinary_diffusion_training() -> None:
    """AdamW without decay on L_DM with the gradient's norm bounded by 1, written out here: the same weights bit for bit."""
    model, task = small.pipe(), tiny.task()
    run = small.run(model, QUICK, task)
    data = Captioned(model, run.images["train"], ["a f", "the f", "a g", "the g"])

    def batch_at(rng: Generator) -> tuple[Tensor, Tensor, Generator]:
        return *data.batch(2, rng), rng

    settings = {"steps": 3, "lr": 1e-3, "optimizer": "adamw", "weight_decay": 0.0, "clip": 1.0}
    train(model.parameters("unet").values(), lambda each: model.diffusion_loss(*each), batch_at, run, **settings)  # type: ignore[arg-type]  # mixed types
    assert small.same(small.weights(small.after(QUICK)[0]), small.weights(model))


def test_training_lowers_the_loss_on_its_images() -> None:
    """A fine-tune that learns nothing would prove nothing: 25 steps lower L_DM, taken on the same four images and noise before and after."""
    model, task = small.pipe(), tiny.task()
    stage = replace(QUICK, steps=25, batch=4, lr=3e-3)
    run = small.run(model, stage, task)
    data = Captioned(model, run.images["train"], stage.images(task)["train"].prompts)
    fixed = data.mean.repeat(8, 1, 1, 1), data.embeddings.repeat(8, 1, 1)
    losses = []
    for training in (True, False):
        with torch.no_grad():
            losses.append(model.diffusion_loss(*fixed, torch.Generator().manual_seed(0)).item())
        if training:
            stage(model, task, run)
    assert losses[1] < 0.95 * losses[0]


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}])
def test_no_step_or_no_rate_changes_nothing(change: dict[str, float]) -> None:
    """AdamW without decay: a rate of zero leaves every bit, as no step does."""
    before = small.weights(small.pipe())
    model, _ = small.after(replace(QUICK, **change))  # type: ignore[arg-type]  # two fields of different types
    assert small.same(before, small.weights(model))


@pytest.mark.parametrize("data", ["in", "out"])
def test_the_papers_ten_concepts_by_five_prompts_by_five_images(data: str) -> None:
    """arXiv 2410.08074, appendix C: 10 x 5 x 5 = 250 images, for ten made-up concepts and for both sets of the celebrity suite."""
    ten = Group(tuple(f"name {i}" for i in range(10)), tuple(f"{word} of {{}}" for word in ("a", "b", "c", "d", "e")))
    chosen = Finetune(data=data).images(replace(tiny.task(), finetune={data: ten}))["train"]
    assert Counter(chosen.prompts) == Counter({f"{word} of name {i}": 5 for word in "abcde" for i in range(10)})
    assert len(chosen.prompts) == len(set(chosen.seeds)) == 250
    task = Task.load(Path(__file__).parents[2] / "suites" / "celebrity" / "pocket.toml")
    assert len(Finetune(data=data).images(task)["train"].prompts) == 250


def test_the_two_fine_tunes_look_at_the_same_images() -> None:
    """LoRA and full fine-tuning differ in what they train, not in what they see: the images are drawn once for both."""
    from harness.finetuning import lora

    assert Finetune().images(tiny.task()) == lora.Finetune().images(tiny.task())
    assert Finetune(seed=1).images(tiny.task()) != Finetune().images(tiny.task())


def test_an_unknown_data_set_is_refused_with_a_guess() -> None:
    """`data="outt"` names no set of the task; the error lists those there are."""
    with pytest.raises(SpecError, match=r"allowed: in, out. Did you mean 'out'"):
        Finetune(data="outt").images(tiny.task())


def test_a_step_costs_one_forward_and_one_backward_pass() -> None:
    """1F + 1B of `batch` images a step."""
    model = small.pipe()
    seen = small.witness(model)
    small.after(replace(QUICK, batch=4), model=model)
    assert model.passes == 3 * 4
    assert all(each.learns for each in seen)
