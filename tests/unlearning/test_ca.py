"""CA: on the anchor's images, the target's prompt gets the anchor's answer."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from harness.data import Captioned
from harness.errors import PreconditionError, SpecError
from harness.pipeline import StableDiffusion, group
from harness.spec import Task
from harness.training import train
from harness.unlearning import dimum
from harness.unlearning.ca import Method, start_detached
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None, max_examples=50)  # a busy machine is no failure
QUICK = Method(steps=3, lr=1e-2, batch=2, images_per_prompt=1)
KV = group("unet.xattn_kv")
VARIANTS = pytest.mark.parametrize("variant", ["model", "noise"])


def asking(*erased: str, anchors: tuple[str, ...] = ("p",)) -> Task:
    """The tiny task with other names."""
    task = tiny.task()
    return replace(task, erased=replace(task.erased, concepts=erased), anchor=replace(task.anchor, concepts=anchors))


def first(stage: Method, **swap: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first step; `swap` puts another item of the batch (by index) in an item's place."""
    model, task = small.pipe(), asking("x")
    run = small.run(model, stage, task)
    moving = model.parameters(stage.trains)
    loss, batch_at = stage.objective(model, task, run)
    batch = list(batch_at(run.rng("step", 0)))
    if swap:
        batch[swap["put"]] = batch[swap["take"]]
    value = loss(tuple(batch))
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in moving.items() if p.grad is not None}


# --- what it looks at -------------------------------------------------------------------------------------------------


@CALM
@given(
    erased=st.lists(st.sampled_from("tuvwxyz"), min_size=1, max_size=4, unique=True).map(tuple),
    anchors=st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True).map(tuple),
    per_prompt=st.integers(1, 3),
)
def test_every_target_gets_each_anchors_images_under_its_own_prompts(erased: tuple[str, ...], anchors: tuple[str, ...], per_prompt: int) -> None:
    """Anchor a, target b, template: `per_prompt` images of "template a" called "template b", and no image of a target is ever drawn."""
    task, method = asking(*erased, anchors=anchors), Method(images_per_prompt=per_prompt)
    drawn = method.images(task)["anchor"].prompts
    expected = Counter({(t.replace("{}", a), t.replace("{}", b)): per_prompt for t in task.erased.prompts for a in anchors for b in erased})
    assert Counter(zip(drawn, method._renamed(task), strict=True)) == expected


def test_it_shares_dimums_images() -> None:
    """The same pictures of the anchor serve both: with one anchor the sets are equal, so the store draws them once."""
    assert Method().images(tiny.task())["anchor"] == dimum.Method().images(tiny.task())["alternative"]
    assert Method.reads == ("erased", "anchor", "sampler")


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_model_based_the_targets_answer_is_pulled_to_the_anchors() -> None:
    """One step: MSE between the passes under c* and under c, on one x_t and t; only the first learns; c* is c with the name changed."""
    model = small.pipe()
    seen = small.witness(model)
    _, run = small.after(replace(QUICK, steps=1, batch=4), asking("x"), model)
    target, anchor = seen
    assert torch.equal(target.x_t, anchor.x_t)
    assert torch.equal(target.t, anchor.t)
    assert (target.learns, anchor.learns) == (True, False)
    pairs = {t: [model.encode([t.replace("{}", name)])[0] for name in ("x", "p")] for t in tiny.task().erased.prompts}
    assert all(any(torch.equal(a, x) and torch.equal(b, p) for x, p in pairs.values()) for a, b in zip(target.embeddings, anchor.embeddings, strict=True))
    assert run.losses == [pytest.approx((target.out - anchor.out).square().mean().item(), rel=1e-5)]


def test_the_anchors_branch_carries_no_gradient_even_with_the_prior() -> None:
    """With a prior of 1e-9 the anchor's pass learns for the prior only: the gradients are those of no prior, as those of a frozen teacher are."""
    value, found = first(QUICK)
    with_prior, again = first(replace(QUICK, prior=1e-9))
    assert with_prior == pytest.approx(value, rel=1e-4)
    assert max(g.abs().max() for g in found.values()) > 1e-6
    assert all(torch.allclose(again[name], g, rtol=1e-3, atol=1e-9) for name, g in found.items())


def test_a_target_that_is_the_anchor_gives_neither_loss_nor_gradient() -> None:
    """c* = c: model-based both passes are one, so loss and gradient are exactly 0."""
    value, found = first(QUICK, put=3, take=2)
    assert value == 0
    assert found
    assert not any(g.any() for g in found.values())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_based_it_is_plain_training_of_the_targets_prompts_on_the_anchors_images(prediction: str) -> None:
    """Bit for bit the weights of ordinary diffusion training, for models of noise and of velocity, with the same optimizer and draws."""
    stage, task = replace(QUICK, variant="noise", detach_start=False), tiny.task()
    model, plain = (StableDiffusion(tiny.pipeline(prediction), small.CPU) for _ in range(2))
    _, mine = small.after(stage, task, model)
    run = small.run(plain, stage, task)
    data = Captioned(plain, run.images["anchor"], stage._renamed(task))

    def batch_at(rng: Generator) -> tuple[Tensor, Tensor, Generator]:
        return *data.batch(stage.batch, rng), rng

    moving = plain.parameters(stage.trains).values()
    train(moving, lambda each: plain.diffusion_loss(*each), batch_at, run, steps=3, lr=1e-2, optimizer="adamw", weight_decay=1e-2, clip=1.0)
    assert run.losses == pytest.approx(mine.losses, rel=1e-5)
    assert all(torch.allclose(p, plain.named()[name], rtol=0, atol=1e-4) for name, p in model.named().items())


@VARIANTS
@pytest.mark.parametrize("prior", [0.25, 2.0])
def test_the_prior_is_the_anchors_own_denoising_loss(variant: Any, prior: float) -> None:
    """One step: prior * MSE(eps_theta(x_t, c, t), eps) on top, with eps taken back from x_t. All pictures are alike and the posterior is taken at its mean."""
    stage, task = replace(QUICK, variant=variant, prior=prior, steps=1), asking("x")
    model = small.pipe()
    run = small.run(model, stage, task)
    run.images = {"anchor": run.images["anchor"][:1].expand_as(run.images["anchor"])}
    x_0, latents = model.latents(run.images["anchor"][:1])[0], model.latents
    model.latents = lambda images: (latents(images)[0], torch.zeros(len(images), *model.latent_shape))  # type: ignore[method-assign]
    seen = small.witness(model)
    stage(model, task, run)
    target, anchor = seen
    abar = model.schedule.alphas_cumprod[target.t].view(-1, 1, 1, 1)
    noise = (target.x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
    wanted = anchor.out if variant == "model" else noise
    expected = (target.out - wanted).square().mean() + prior * (anchor.out - noise).square().mean()
    assert run.losses == [pytest.approx(expected.item(), rel=1e-3)]
    assert (target.learns, anchor.learns) == (True, True)


def test_each_term_decides_the_weights() -> None:
    """Signature: variant, prior and detached start token each lead elsewhere, in keys and values alike."""
    stages = [QUICK, replace(QUICK, variant="noise"), replace(QUICK, prior=1.0), replace(QUICK, detach_start=False)]
    results = [small.weights(small.after(replace(stage, lr=1e-3))[0], KV) for stage in stages]
    assert all(small.moved(results[0], other) == set(results[0]) for other in results[1:])


@pytest.mark.parametrize("detach", [True, False])
def test_the_first_gradient_is_that_of_a_frozen_teacher(detach: bool) -> None:
    """Before the first step student and original are one: the gradients are those of regression on the original's answer, a constant."""
    stage, model, task = replace(QUICK, detach_start=detach), small.pipe(), asking("x")
    run = small.run(model, stage, task)
    moving = model.parameters(stage.trains)
    x_t, t, c, c_star, _ = stage.objective(model, task, run)[1](run.rng("step", 0))
    with model.swapped(run.original):
        wanted = model.predict(x_t, t, c)
    with start_detached(model) if detach else nullcontext():
        torch.nn.functional.mse_loss(model.predict(x_t, t, c_star), wanted).backward()
    _, found = first(stage)
    assert found.keys() == moving.keys()
    assert all(torch.equal(found[name], p.grad) for name, p in moving.items())


@pytest.mark.parametrize(("field", "value"), [("weight_decay", 0.5), ("clip", 1e-6), ("clip", 0.0), ("batch", 1), ("lr", 1e-3), ("images_per_prompt", 2)])
def test_every_number_counts(field: str, value: float) -> None:
    """Each field of the training reaches it: with another value other weights come out, and no clip is not a wide or a narrow one."""
    stage = replace(QUICK, clip=1e-4)
    first, second = (small.weights(small.after(each)[0], KV) for each in (stage, replace(stage, **{field: value})))
    assert small.moved(first, second)


# --- the start token --------------------------------------------------------------------------------------------------


def test_detaching_the_start_token_changes_no_number() -> None:
    """Bit for bit the same prediction, and afterwards no hook is left."""
    model = small.pipe()
    x, t, c = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([7, 500]), model.encode(["x", "the y"])
    with start_detached(model):
        inside = model.predict(x, t, c)
    assert torch.equal(inside, model.predict(x, t, c))
    assert not any(module._forward_hooks for name, module in model.unet.named_modules() if "attn2" in name)


def test_a_lone_start_token_teaches_keys_and_values_nothing() -> None:
    """A sequence of one token: gradients of to_k and to_v are exactly 0 detached, and of to_v not 0 otherwise; other weights still learn."""
    model = small.pipe()
    x, t, c = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([500]), model.encode(["x"])[:, :1]
    for detached in (True, False):
        moving = model.parameters("unet")
        if detached:
            with start_detached(model):
                out = model.predict(x, t, c)
        else:
            out = model.predict(x, t, c)
        out.square().sum().backward()
        values = [p.grad for name, p in moving.items() if KV(name) and ".to_v." in name]
        assert all(g is None or not g.any() for g in values) is detached
        assert moving["unet.conv_in.weight"].grad.any()
        if detached:
            assert all(p.grad is None or not p.grad.any() for name, p in moving.items() if KV(name))


def test_the_methods_loss_detaches_it_and_the_switch_does_not() -> None:
    """The first gradient of every key and value differs between the two, the loss does not."""
    (value, with_cut), (same, without) = first(QUICK), first(replace(QUICK, detach_start=False))
    assert value == same
    assert small.moved(with_cut, without) == set(with_cut)


# --- cost and scope ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "prior", "learning", "still"), [("model", 0.0, 1, 1), ("noise", 0.0, 1, 0), ("model", 1.0, 2, 0), ("noise", 1.0, 2, 0)])
def test_a_step_costs_what_the_docstring_says(variant: Any, prior: float, learning: int, still: int) -> None:
    """Passes a step with gradient and without: `model` 1 and 1, `noise` 1 and 0, either with the prior 2 and 0."""
    model = small.pipe()
    seen = small.witness(model)
    small.after(replace(QUICK, variant=variant, prior=prior, batch=4), model=model)
    assert sum(each.learns for each in seen) == 3 * learning
    assert sum(not each.learns for each in seen) == 3 * still
    assert model.passes == 3 * 4 * (learning + still)


@pytest.mark.parametrize(("trains", "count"), [("unet.xattn_kv", 8), ("unet.xattn", 20), ("unet", None)])
def test_only_the_named_group_moves(trains: str, count: int | None) -> None:
    """By default the 8 key and value matrices of the tiny model; all of them, and nothing else."""
    before = small.weights(small.pipe())
    model, _ = small.after(replace(QUICK, trains=trains))
    changed = small.moved(before, small.weights(model))
    assert changed == {name for name in before if group(trains)(name)}
    assert count is None or len(changed) == count


# --- requests that cannot be meant ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (asking("x", " p"), "' p' and the anchor 'p' are the same; choose another `anchor`"),
        (asking("x", anchors=("q", " x")), "'x' and the anchor ' x' are the same"),
        (asking("x", ""), "'' is an empty prompt; name another in the task's `erased`"),
        (asking("12"), "'12' is an empty prompt"),
        (asking("x" * 15), "`erased` or `anchor`: .* 17 tokens .* shorten"),
        (asking("x", anchors=("p" * 15,)), "`erased` or `anchor`: .* 17 tokens .* shorten"),
    ],
)
def test_names_that_cannot_be_told_apart_or_read_are_refused(task: Task, message: str) -> None:
    """A target that the tokenizer reads as its anchor would train nothing; the error names the role and the way out, and the weights stay."""
    model, before = small.pipe(), small.weights(small.pipe())
    with pytest.raises(SpecError, match=message):
        small.after(QUICK, task, model)
    assert small.same(before, small.weights(model))


@pytest.mark.parametrize(("field", "value", "message"), [("batch", 0, "at least 1"), ("images_per_prompt", 0, "at least 1"), ("prior", -0.1, "at least 0")])
def test_numbers_out_of_range_are_refused(field: str, value: float, message: str) -> None:
    """No images, none in a batch, or a prior that pushes away: the error names the field."""
    with pytest.raises(SpecError, match=f"`{field}` must be {message}, got {value}"):
        Method(**{field: value})  # type: ignore[arg-type]


def test_a_loss_that_is_not_a_number_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the prediction: an error with step and learning rate."""
    model = small.pipe()
    monkeypatch.setattr(model, "predict", lambda x, t, c: x * float("nan"))
    with pytest.raises(PreconditionError, match="nan at step 1 of 3; try a smaller lr"):
        small.after(QUICK, model=model)


def test_a_group_that_matches_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without cross-attention: the error names group and choices."""
    model, task = small.pipe(), tiny.task()
    run, named = small.run(model, QUICK, task), {name: p for name, p in model.named().items() if not KV(name)}
    monkeypatch.setattr(model, "named", lambda: named)
    with pytest.raises(SpecError, match=r"'unet.xattn_kv' matches nothing .* allowed"):
        QUICK(model, task, run)
