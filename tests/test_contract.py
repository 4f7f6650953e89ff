"""What every stage promises. A new file in `harness/unlearning`, `finetuning` or `relearning` is covered by being there."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.models import presets
from harness import catalogue, sampling
from harness.catalogue import Spec
from harness.pipeline import Pipe, StableDiffusion, group
from harness.spec import Base, ImageSet, Lineage, Sampler, Stage
from harness.training import Run
from tests import tiny

KINDS = ("unlearning", "finetuning", "relearning")
STAGES = [(kind, name) for kind in KINDS for name in catalogue.names(kind) if hasattr(catalogue.find(kind, name), "trains")]  # not an attack on prompts
SMALL = {"steps": 2, "lr": 1e-2, "batch": 2, "images_per_prompt": 1, "images_per_concept": 2, "sampler_steps": 3, "lora_steps": 2, "segmenter": "whole"}
TASK = tiny.task()
every_stage = pytest.mark.parametrize(("kind", "name"), STAGES)


def has(kind: str, name: str, field: str) -> bool:
    """Whether a stage has a field."""
    return field in {f.name for f in dataclasses.fields(catalogue.find(kind, name))}


def small(kind: str, name: str, **changes: Any) -> Any:
    """The stage with few steps and images, and a learning rate that shows."""
    fields = {field: value for field, value in {**SMALL, **changes}.items() if has(kind, name, field)}
    return catalogue.make(kind, Spec(name), {}, **fields)


@cache
def _built(prediction: str) -> Pipe:
    return StableDiffusion(tiny.pipeline(prediction), torch.device("cpu"))


def model(prediction: str = "epsilon") -> Pipe:
    """The tiny model, fresh."""
    return copy.deepcopy(_built(prediction))


def weights(pipe: Pipe) -> dict[str, Tensor]:
    """Copies of all weights."""
    return {name: p.detach().clone() for name, p in pipe.named().items()}


@cache
def drawn(chosen: ImageSet) -> Tensor:
    """Images of the tiny model."""
    return sampling.draw(model(), chosen.prompts, chosen.seeds, TASK.sampler)


def execute(pipe: Pipe, stage: Any, **earlier: Any) -> Run:
    """Run a stage as the engine does; `earlier` is what an earlier snapshot left."""
    images = {name: drawn(chosen) for name, chosen in stage.images(TASK.view(stage.reads)).items()}
    original = {name: tensor.clone() for name, tensor in before().items() if group(stage.trains)(name)}
    run = Run(stage.seed, images, original, **earlier)
    stage(pipe, TASK.view(stage.reads), run)
    return run


def used(pipe: Pipe, stage: Any, run: Run) -> dict[str, Tensor]:
    """All weights with the stage's work in use: an adapter is merged."""
    if run.adapter:
        pipe.apply(stage.merged(pipe, run.adapter))
    return weights(pipe)


@cache
def before(prediction: str = "epsilon") -> Mapping[str, Tensor]:
    """The tiny model's weights."""
    return weights(model(prediction))


@cache
def after(stage: Any, prediction: str = "epsilon") -> Mapping[str, Tensor]:
    """The tiny model's weights after the stage."""
    pipe = model(prediction)
    return used(pipe, stage, execute(pipe, stage))


def moved(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> set[str]:
    """The names of tensors whose bits differ."""
    assert one.keys() == two.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}


@every_stage
def test_a_stage_is_its_fields(kind, name):
    """A frozen dataclass with a version, a seed, a group to train and the parts of the task that it reads."""
    stage: Stage = small(kind, name)
    assert dataclasses.is_dataclass(stage)
    assert stage.__dataclass_params__.frozen
    assert stage == small(kind, name)
    assert stage.version >= 1
    assert has(kind, name, "seed")
    assert set(stage.reads) <= {f.name for f in dataclasses.fields(TASK)}
    assert any(map(group(stage.trains), before()))


@every_stage
def test_what_is_learnt_from_images_has_their_sampler_in_its_address(kind, name):
    """Images drawn in other steps make another model."""
    stage = small(kind, name)
    ends = {Lineage(Base("digest", "source"), dataclasses.replace(TASK, sampler=Sampler(steps, 3.0)), (stage,)).key for steps in (6, 50)}
    assert len(ends) == 2 or not stage.images(TASK.view(stage.reads))


@every_stage
def test_a_stage_names_its_source_and_what_differs(kind, name):
    """The docstring holds the paper or the code it follows, and what is different here."""
    text = catalogue.find(kind, name).__doc__
    assert "Differs from" in text
    assert re.search(r"arXiv \d{4}\.\d{5}|, 20\d\d\b|@[0-9a-f]{7}\b", text)


@every_stage
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_stage_changes_only_what_it_says(kind, name, prediction):
    """Bit for bit: something inside `trains` moves, nothing outside of it, and all of it stays finite, for both kinds of model."""
    stage = small(kind, name)
    changed = moved(before(prediction), after(stage, prediction))
    assert changed
    assert [each for each in changed if not group(stage.trains)(each)] == []
    assert all(torch.isfinite(tensor).all() for tensor in after(stage, prediction).values())


@every_stage
def test_a_stage_leaves_the_model_as_it_was_built(kind, name):
    """No adapter, hook or gradient-free flag of text encoder and VAE stays behind; what it was given is not written to."""
    pipe, stage = model(), small(kind, name)
    modules = [(each, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for each, m in pipe.unet.named_modules()]
    run = execute(pipe, stage)
    assert [(each, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for each, m in pipe.unet.named_modules()] == modules
    assert moved(run.original, {each: before()[each] for each in run.original}) == set()
    assert "peft_config" not in vars(pipe.unet)


@every_stage
def test_the_same_seed_gives_the_same_weights(kind, name):
    """Bit for bit, whatever anybody did to torch's global generator, which the stage leaves alone."""
    results = []
    for seed in (1, 2):
        pipe, stage = model(), small(kind, name)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        run = execute(pipe, stage)
        assert torch.equal(state, torch.get_rng_state())
        results.append(used(pipe, stage, run))
    assert moved(*results) == set()


@every_stage
def test_another_seed_gives_other_weights_if_anything_is_drawn(kind, name):
    """A stage that takes steps or asks for images draws: its seed matters. A closed form has nothing to draw: it does not."""
    one, two = (small(kind, name, seed=seed) for seed in (0, 1))
    draws = has(kind, name, "steps") or bool(one.images(TASK.view(one.reads)))
    assert bool(moved(after(one), after(two))) is draws


@every_stage
def test_fields_survive_json_and_the_command_line(kind, name):
    """Written as JSON or as name:field=value and read again, a stage is equal and has the same address."""
    stage = small(kind, name, seed=3, trains="u")
    fields = json.loads(json.dumps(catalogue.fields(stage)))
    written = tuple((field, str(value)) for field, value in fields.items() if value is not None)
    for again in (
        catalogue.make(kind, Spec(name), {kind: {name: fields}}),
        catalogue.make(kind, Spec.parse(str(Spec(name, written))), {}),
    ):
        assert again == stage
        assert Lineage(Base("d", ""), TASK, (again,)).key == Lineage(Base("d", ""), TASK, (stage,)).key


@every_stage
def test_a_stage_says_what_it_costs(kind, name):
    """The UNet passes that a plan counts are those that are made; a stage that samples for a drawn number of steps says the average."""
    stage, pipe = small(kind, name), model()
    execute(pipe, stage)
    steps, guidance = getattr(stage, "steps", 0), getattr(stage, "guidance", 1)
    drawn = steps * getattr(stage, "batch", 0) * (1 if guidance == 1 else 2) * (getattr(stage, "sampler_steps", 1) - 1) / 2
    assert abs(catalogue.passes(stage, TASK.view(stage.reads), steps) - pipe.passes) <= drawn


@pytest.mark.parametrize("field", ["lr", "steps"])
@every_stage
def test_a_stage_that_takes_no_step_changes_nothing(kind, name, field):
    """With learning rate 0, or no steps, the weights stay; a stage without that field is no gradient method and has neither."""
    if not has(kind, name, field):
        assert not has(kind, name, "batch")
        return
    assert moved(before(), after(small(kind, name, **{field: 0}))) == set()


@every_stage
def test_a_stage_with_steps_is_a_trajectory(kind, name):
    """One step continued to two equals two at once, bit for bit: weights, adapter and optimizer. Without steps, no state is kept."""
    pipe = model()
    if not has(kind, name, "steps"):
        assert execute(pipe, small(kind, name)).state == {}
        return
    first = execute(pipe, small(kind, name, steps=1))
    second = execute(pipe, small(kind, name, steps=2), start=1, state=first.state, adapter=first.adapter)
    unbroken = execute(whole := model(), small(kind, name, steps=2))
    assert moved(second.state, unbroken.state) == set()
    assert moved(used(pipe, small(kind, name), second), used(whole, small(kind, name), unbroken)) == set()
    assert len(unbroken.losses) == 2
    assert first.losses + second.losses == unbroken.losses


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, stages in presets("pocket").items() for name in stages])
def test_presets_belong_to_stages_that_exist(kind, name):
    """Each preset of the pocket model names a stage and its fields, in the fields' own types."""
    preset = presets("pocket")[kind][name]
    stage = catalogue.make(kind, Spec(name), presets("pocket"))
    plain = catalogue.make(kind, Spec(name), {})
    assert preset.items() <= catalogue.fields(stage).items()
    assert all(type(value) is type(getattr(plain, field)) for field, value in preset.items())
