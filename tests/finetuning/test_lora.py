"""LoRA: a low-rank adapter learns, the weights under it do not, and afterwards nothing of it is left in the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from harness.errors import SpecError
from harness.finetuning.lora import Finetune
from harness.pipeline import Pipe
from harness.spec import Group, Task
from tests import tiny
from tests.unlearning import _small as small

QUICK = Finetune(steps=3, rank=2, alpha=6.0, lr=1e-2, batch=2, images_per_prompt=1)
ATTENTION = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")


def layers(model: Pipe) -> list[str]:
    """The class of every module, by name: any trace of an adapter shows here."""
    return [f"{name}: {type(module).__module__}.{type(module).__qualname__}" for name, module in model.unet.named_modules()]


def trained(stage: Finetune = QUICK) -> tuple[Pipe, dict[str, Tensor], dict[str, Tensor]]:
    """The model, its weights before, and the adapter after training."""
    model = small.pipe()
    before = small.weights(model)
    _, run = small.after(stage, model=model)
    return model, before, run.adapter


# --- what the adapter amounts to --------------------------------------------------------------------------------------


def test_merged_weights_are_the_old_ones_plus_the_scaled_product() -> None:
    """W' = W + (alpha / rank) B A with alpha 6 and rank 2, that is W + 3 B A, for each query, key, value and output projection and for nothing else."""
    model, before, adapter = trained()
    merged = QUICK.merged(model, adapter)
    assert set(merged) == {name for name in before if name.startswith("unet.") and name.endswith(ATTENTION)}
    for name, weight in merged.items():
        module = name.removeprefix("unet.").removesuffix(".weight")
        a, b = adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"]
        assert (len(a), b.shape[1]) == (2, 2)
        assert torch.allclose(weight, before[name] + 3 * b @ a, rtol=0, atol=1e-6)
        assert (weight - before[name]).abs().max() > 1e-4
    assert len(adapter) == 2 * len(merged)


def test_alpha_over_rank_is_the_scale() -> None:
    """The same A and B under twice the alpha are twice the change."""
    model, before, adapter = trained()
    once, twice = (replace(QUICK, alpha=alpha).merged(model, adapter) for alpha in (6.0, 12.0))
    assert all(torch.allclose(twice[name] - before[name], 2 * (once[name] - before[name]), rtol=0, atol=1e-6) for name in once)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_change_has_no_more_rank_than_the_adapter(rank: int) -> None:
    """B A passes through `rank` coordinates: of the 8 or 16 singular values of W' - W, as many differ from 0 (up to float32 rounding)."""
    stage = replace(QUICK, rank=rank, steps=4)
    model, before, adapter = trained(stage)
    for name, weight in stage.merged(model, adapter).items():
        values = torch.linalg.svdvals((weight - before[name]).double())
        assert values[rank] < 1e-3 * values[rank - 1]


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}])
def test_an_adapter_that_did_not_learn_changes_nothing(change: dict[str, float]) -> None:
    """B starts at zero: no step, or a rate of zero, leaves W' = W bit for bit."""
    stage = replace(QUICK, **change)  # type: ignore[arg-type]  # two fields of different types
    model, before, adapter = trained(stage)
    assert adapter
    assert all(torch.equal(weight, before[name]) for name, weight in stage.merged(model, adapter).items())


def test_the_trained_model_is_the_merged_model() -> None:
    """What was trained is what is used: the model with the adapter in place predicts what the merged weights predict."""
    model, _, adapter = trained()
    x, t, c = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(300), model.encode(["x", "y"])
    plain = model.predict(x, t, c)
    QUICK._inject(model, adapter)
    with torch.no_grad():
        adapted = model.predict(x, t, c)
    merged = QUICK.merged(small.pipe(), adapter)
    other = small.pipe()
    other.apply(merged)
    assert torch.allclose(adapted, other.predict(x, t, c), rtol=0, atol=1e-5)
    assert (adapted - plain).abs().max() > 1e-3


# --- what it leaves alone ---------------------------------------------------------------------------------------------


def test_the_weights_under_the_adapter_stay_while_it_trains() -> None:
    """At every step the base layers hold the old bits, and afterwards every parameter has its old name and value."""
    model, before, steps = small.pipe(), small.weights(small.pipe()), []

    def watch(step: int, of: int, loss: float) -> None:
        plain = {name.replace(".base_layer", ""): p for name, p in model.named().items() if ".lora_" not in name}
        assert small.same(plain, before)
        steps.append(len(model.named()) - len(plain))

    task = tiny.task()
    QUICK(model, task, small.run(model, QUICK, task, report=watch))
    assert steps == [2 * 32] * 3  # A and B of 4 blocks x (self + cross) x 4 projections
    assert small.same(small.weights(model), before)


def test_nothing_of_the_adapter_is_left_in_the_model() -> None:
    """After training and after merging the module classes are the plain ones, no peft configuration is left, and no parameter wants a gradient."""
    model, _, adapter = trained()
    plain = layers(small.pipe())
    assert layers(model) == plain
    QUICK.merged(model, adapter)
    assert layers(model) == plain
    assert not any(isinstance(module, LoraLayer) for module in model.unet.modules())
    assert not hasattr(model.unet, "peft_config")
    assert not any(p.requires_grad for p in model.named().values())


def test_the_adapter_is_taken_out_when_training_fails() -> None:
    """A run that breaks off leaves the plain layers and the old weights behind."""
    model, before = small.pipe(), small.weights(small.pipe())
    task = tiny.task()

    def fall(step: int, of: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        QUICK(model, task, small.run(model, QUICK, task, report=fall))
    assert layers(model) == layers(small.pipe())
    assert small.same(small.weights(model), before)


def test_the_adapter_is_drawn_from_the_stages_seed_alone() -> None:
    """peft draws A from the global generator: its state is the same afterwards, and another state before gives the same adapter; another seed does not."""
    adapters = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        _, _, adapter = trained(replace(QUICK, steps=0, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        adapters.append(adapter)
    assert small.same(adapters[0], adapters[1])
    assert all("lora_A" in name for name in small.moved(adapters[0], adapters[2]))
    assert len(small.moved(adapters[0], adapters[2])) == 32


@pytest.mark.parametrize("targets", ["to_z", "to_q,to_z"])
def test_a_target_that_matches_nothing_is_refused(targets: str) -> None:
    """A misspelt target would train less than was asked, or nothing: an error that names it, and the model stays as it was."""
    model, before = small.pipe(), small.weights(small.pipe())
    with pytest.raises(SpecError, match="to_z"):
        small.after(replace(QUICK, targets=targets), model=model)
    assert layers(model) == layers(small.pipe())
    assert not hasattr(model.unet, "peft_config")
    assert small.same(small.weights(model), before)


def test_only_the_targets_get_an_adapter() -> None:
    """`targets="to_k"` adapts 8 layers, the keys of self- and cross-attention in 4 blocks."""
    _, _, adapter = trained(replace(QUICK, targets="to_k"))
    assert len(adapter) == 16
    assert all(".to_k.lora_" in name for name in adapter)


# --- what it learns from ----------------------------------------------------------------------------------------------


def test_the_papers_ten_concepts_by_five_prompts_by_five_images() -> None:
    """arXiv 2410.08074, appendix C: 10 x 5 x 5 = 250 images, each concept under each prompt five times, no seed twice."""
    group = Group(tuple(f"name {i}" for i in range(10)), tuple(f"{word} of {{}}" for word in ("a", "b", "c", "d", "e")))
    chosen = Finetune().images(replace(tiny.task(), finetune={"in": group}))["train"]
    assert Counter(chosen.prompts) == Counter({f"{word} of name {i}": 5 for word in "abcde" for i in range(10)})
    assert len(chosen.prompts) == len(set(chosen.seeds)) == 250


@pytest.mark.parametrize("data", ["in", "out"])
def test_the_celebrity_suite_asks_for_250_images(data: str) -> None:
    """Both fine-tuning sets of the committed task have the paper's size."""
    task = Task.load(Path(__file__).parents[2] / "suites" / "celebrity" / "pocket.toml")
    assert len(Finetune(data=data).images(task)["train"].prompts) == 250


def test_an_unknown_data_set_is_refused_with_a_guess() -> None:
    """`data="inn"` names no set of the task; the error lists those there are."""
    with pytest.raises(SpecError, match=r"allowed: in, out. Did you mean 'in'"):
        Finetune(data="inn").images(tiny.task())


def test_a_step_costs_one_forward_and_one_backward_pass() -> None:
    """1F + 1B of `batch` images a step; the captions are the prompts of the fine-tuning set."""
    model = small.pipe()
    seen = small.witness(model, "unet.conv_in.weight")
    small.after(replace(QUICK, batch=4), model=model)
    texts = model.encode(["a f", "the f", "a g", "the g"])
    assert model.passes == 3 * 4
    assert all(each.learns for each in seen)
    assert all((texts == row).flatten(1).all(1).any() for each in seen for row in each.embeddings)
