"""Retain: a control that trains on what is kept, with the very steps of the methods that it is compared with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.errors import PreconditionError, SpecError
from harness.pipeline import group
from harness.unlearning import dimum, ga
from harness.unlearning.retain import Method
from tests import tiny
from tests.unlearning import _small as small

SAME = {"steps": 3, "lr": 1e-3, "batch": 2, "images_per_prompt": 1}
QUICK = Method(**SAME)  # type: ignore[arg-type]  # each its own type


@pytest.mark.parametrize("other", [dimum.Method(lam=0.0, **SAME), ga.Method(lam=0.0, **SAME)], ids=["dimum", "ga"])  # type: ignore[arg-type]
def test_it_takes_the_steps_of_methods_without_their_unlearning_term(other: object) -> None:
    """lambda = 0 leaves DiMUM and gradient ascent their retain term: same images, same draws, same weights and losses, bit for bit."""
    mine, theirs = small.after(QUICK), small.after(other)
    assert QUICK.images(tiny.task())["retain"] == other.images(tiny.task())["retain"]  # type: ignore[attr-defined]  # a Method
    assert small.same(small.weights(mine[0]), small.weights(theirs[0]))
    assert mine[1].losses == theirs[1].losses


@pytest.mark.parametrize("other", [dimum.Method(lam=1.0, **SAME), ga.Method(lam=1.0, **SAME)], ids=["dimum", "ga"])  # type: ignore[arg-type]
def test_with_their_unlearning_term_they_part(other: object) -> None:
    """Signature, and the control of the test above."""
    assert small.moved(small.weights(small.after(QUICK)[0]), small.weights(small.after(other)[0]))


def test_another_batch_is_another_control() -> None:
    """Equal steps are not enough: with another batch size the weights differ."""
    assert small.moved(small.weights(small.after(QUICK)[0]), small.weights(small.after(replace(QUICK, batch=3))[0]))


def test_it_reads_the_retain_set_only() -> None:
    """2 retained names, 2 prompts, 5 images: 20, and it is not even told who is erased."""
    assert Method.reads == ("retain", "sampler")
    assert len(Method().images(tiny.task())["retain"].prompts) == 20
    small.after(QUICK, tiny.task().view(Method.reads))


def test_the_images_and_their_own_prompts_are_what_it_learns() -> None:
    """Every pass reads prompts of retained names; other pictures of them give other weights."""
    model, task = small.pipe(), tiny.task()
    seen = small.witness(model)
    small.after(QUICK, task, model)
    texts = [model.encode([p])[0] for name in task.retain.concepts for p in task.retain.asking(name)]
    assert all(any(torch.equal(row, text) for text in texts) for each in seen for row in each.embeddings)
    results: list[dict[str, Tensor]] = []
    for seed in (1, 2):
        model = small.pipe()
        QUICK(model, task, small.run(model, QUICK, task, images={"retain": small.pictures(4, seed)}))
        results.append(small.weights(model))
    assert small.moved(*results)


def test_a_step_costs_one_forward_and_one_backward_pass() -> None:
    """1F + 1B: `batch` samples a step, each with gradient."""
    model = small.pipe()
    seen = small.witness(model)
    small.after(replace(QUICK, batch=4), model=model)
    assert model.passes == 3 * 4
    assert len(seen) == 3
    assert all(each.learns for each in seen)


@pytest.mark.parametrize("trains", ["unet", "x"])
def test_only_the_named_group_moves(trains: str) -> None:
    """The UNet by default, the cross-attention if asked; all else stays bit for bit."""
    before = small.weights(small.pipe())
    model, _ = small.after(replace(QUICK, trains=trains))
    assert small.moved(before, small.weights(model)) == {name for name in before if group(trains)(name)}


@pytest.mark.parametrize("field", ["batch", "images_per_prompt"])
def test_nothing_to_train_on_is_refused(field: str) -> None:
    """No images, or none in a batch: the error names the field."""
    with pytest.raises(SpecError, match=f"`{field}` must be at least 1, got 0"):
        Method(**{field: 0})


def test_nobody_to_retain_is_refused() -> None:
    """An empty retain list is no group of concepts."""
    with pytest.raises(SpecError, match="at least one concept"):
        replace(tiny.task().retain, concepts=())


def test_a_loss_that_is_not_a_number_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the prediction: an error with step and learning rate."""
    model = small.pipe()
    monkeypatch.setattr(model, "predict", lambda x, t, c: x * float("nan"))
    with pytest.raises(PreconditionError, match="nan at step 1 of 3; try a smaller lr"):
        small.after(QUICK, model=model)


def test_a_group_that_matches_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without such weights: the error names group and choices."""
    model, task, stage = small.pipe(), tiny.task(), replace(QUICK, trains="x")
    run, named = small.run(model, stage, task), {name: p for name, p in model.named().items() if not group("x")(name)}
    monkeypatch.setattr(model, "named", lambda: named)
    with pytest.raises(SpecError, match=r"'x' matches nothing .* allowed"):
        stage(model, task, run)
