"""SalUn: relabelling, by the salient weights only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from harness import catalogue
from harness.catalogue import Spec
from harness.data import Captioned
from harness.pipeline import group
from harness.training import train
from harness.unlearning.salun import PRESETS, Method
from tests import tiny
from tests.unlearning import _small as small

QUICK = Method(steps=3, lr=1e-2, batch=2, images_per_prompt=1)


def masked(stage: Method) -> dict[str, Tensor]:
    """The stage's mask on a fresh tiny model."""
    model = small.pipe()
    return stage.mask(model, tiny.task(), small.run(model, stage, tiny.task()))


# --- the mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_weights_outside_the_mask_keep_their_bits(sparsity: float) -> None:
    """theta[~m] = theta_0[~m] exactly, and nearly all of m moves."""
    stage = replace(QUICK, sparsity=sparsity)
    mask, before = masked(stage), small.weights(small.pipe())
    after = small.weights(small.after(stage)[0])
    assert small.same({n: before[n][~m] for n, m in mask.items()}, {n: after[n][~m] for n, m in mask.items()})
    share = torch.cat([(before[n] != after[n])[m] for n, m in mask.items()]).float().mean()
    assert share > 0.99


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_mask_holds_the_asked_share_of_all_weights(sparsity: float) -> None:
    """One ranking for the whole group, not one per tensor: sum(m) = floor((1 - sparsity) N) and the shares of tensors differ."""
    mask = masked(replace(QUICK, sparsity=sparsity))
    total = sum(m.numel() for m in mask.values())
    assert sum(int(m.sum()) for m in mask.values()) == pytest.approx((1 - sparsity) * total, abs=1)
    assert len({round(m.float().mean().item(), 2) for m in mask.values()}) > 5


def test_the_mask_is_the_largest_of_the_accumulated_gradient() -> None:
    """|sum over batches of grad|, signed before the sum, of the guided loss on the erased images under their own captions: by hand in two batches."""
    stage, model, task = replace(QUICK, mask_guidance=2.0, sparsity=0.7, trains="x-strict"), small.pipe(), tiny.task()
    run = small.run(model, stage, task)
    found = stage.mask(model, task, run)
    data, parameters = Captioned(model, run.images["forget"], stage.images(task)["forget"].prompts), model.parameters("x-strict")
    sums = [torch.zeros_like(p) for p in parameters.values()]
    for i in range(2):
        rng, rows = run.rng("pass", i), slice(2 * i, 2 * i + 2)
        x_0 = data.mean[rows] + data.std[rows] * torch.randn(data.mean[rows].shape, generator=rng)
        noise, t = torch.randn(x_0.shape, generator=rng), torch.randint(1000, (2,), generator=rng)
        x_t = model.noised(x_0, noise, t)
        guided = 3 * model.predict(x_t, t, data.embeddings[rows]) - 2 * model.predict(x_t, t, model.encode(["", ""]))
        for total, g in zip(sums, torch.autograd.grad(mse_loss(guided, noise), list(parameters.values())), strict=True):
            total += g
    flat = torch.cat([s.flatten() for s in sums]).abs()
    expected = flat >= flat.sort(descending=True).values[int(0.3 * len(flat) + 1e-6) - 1]
    agree = torch.cat([m.flatten() for m in found.values()]) == expected
    assert agree.float().mean() > 0.999  # rounding of a double batch


def test_the_mask_stays_when_a_trajectory_goes_on() -> None:
    """Taken from trained weights, the mask is the one of the weights before unlearning."""
    model, task = small.pipe(), tiny.task()
    run = small.run(model, QUICK, task)
    first = QUICK.mask(model, task, run)
    QUICK(model, task, run)
    assert small.same(first, QUICK.mask(model, task, run))
    run.original = small.weights(model)
    assert small.moved(first, QUICK.mask(model, task, run))


def test_a_mask_of_zeros_leaves_the_model() -> None:
    """sparsity 1: not one bit after ten steps."""
    model, _ = small.after(replace(QUICK, sparsity=1.0, steps=10))
    assert small.same(small.weights(model), small.weights(small.pipe()))


def test_with_and_without_the_mask_the_weights_differ() -> None:
    """Signature: the mask reaches the gradients."""
    results = [small.weights(small.after(replace(QUICK, sparsity=s, steps=1))[0], group("unet")) for s in (0.0, 0.5)]
    assert small.moved(*results)


def test_guidance_of_the_mask_matters() -> None:
    """w = 0 and w = 7.5 rank the weights differently."""
    assert small.moved(masked(replace(QUICK, mask_guidance=0.0)), masked(QUICK))


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_a_mask_of_ones_is_unmasked_relabelling() -> None:
    """sparsity 0: bit for bit the weights of training on MSE(eps(c_f), eps(c_a)) + alpha L_DM(D_r) with the same draws."""
    stage, model, task = replace(QUICK, sparsity=0.0, alpha=0.3), small.pipe(), tiny.task()
    run = small.run(model, stage, task)
    sets = stage.images(task)
    forget, retain = (Captioned(model, run.images[name], sets[name].prompts) for name in ("forget", "retain"))
    anchors = model.encode([p.replace("x", "p").replace("y", "p") for p in sets["forget"].prompts])

    def loss(rng: Generator) -> Tensor:
        kept = model.diffusion_loss(*retain.batch(2, rng), rng)
        chosen = torch.randint(4, (2,), generator=rng)
        x_0 = forget.mean[chosen] + forget.std[chosen] * torch.randn((2, *model.latent_shape), generator=rng)
        noise, t = torch.randn(x_0.shape, generator=rng), torch.randint(1000, (2,), generator=rng)
        x_t = model.noised(x_0, noise, t)
        wanted = model.predict(x_t, t, anchors[chosen]).detach()
        return mse_loss(model.predict(x_t, t, forget.embeddings[chosen]), wanted) + 0.3 * kept

    train(model.parameters("unet").values(), loss, lambda rng: rng, run, steps=3, lr=1e-2)
    assert small.same(small.weights(model), small.weights(small.after(stage)[0]))


def test_the_target_is_the_current_model_under_the_anchors_name() -> None:
    """Step by step: retain, target (no gradient), student; target and student share x_t, t and weights, and the weights are not the first step's."""
    model, task = small.pipe(), tiny.task()
    seen = small.witness(model)
    stage = replace(QUICK, sparsity=0.0, alpha=2.0)
    small.after(stage, task, model)
    texts = [{p: model.encode([p])[0] for c in g.concepts for p in task.erased.asking(c)} for g in (task.anchor, task.erased)]
    for step in range(3):
        kept, target, student = seen[3 * step : 3 * step + 3]
        assert [each.learns for each in (kept, target, student)] == [True, False, True]
        assert torch.equal(target.x_t, student.x_t)
        assert torch.equal(target.t, student.t)
        assert torch.equal(target.weight, student.weight)
        for each, allowed in zip((target, student), texts, strict=True):
            assert all(any(torch.equal(row, text) for text in allowed.values()) for row in each.embeddings)
    assert not torch.equal(seen[1].weight, seen[4].weight)


def test_alpha_weighs_the_retain_term() -> None:
    """alpha 0: the retained images do not matter; otherwise they do."""
    results = {}
    for alpha in (0.0, 1.0):
        for seed in (1, 2):
            model, task, stage = small.pipe(), tiny.task(), replace(QUICK, alpha=alpha)
            run = small.run(model, stage, task)
            run.images = {**run.images, "retain": small.pictures(len(run.images["retain"]), seed)}
            stage(model, task, run)
            results[alpha, seed] = small.weights(model)
    assert small.same(results[0.0, 1], results[0.0, 2])
    assert small.moved(results[1.0, 1], results[1.0, 2])


def test_a_step_costs_three_forward_and_two_backward_passes() -> None:
    """3F + 2B a step; the mask 2F + 2B once per image of D_f, and nothing with sparsity 0."""
    for sparsity, once in ((0.0, 0), (0.5, 2 * 4)):
        model = small.pipe()
        backwards = small.backwards(model)
        small.after(replace(QUICK, sparsity=sparsity), model=model)
        assert model.passes == once + 3 * 3 * 2
        assert sum(backwards) == once + 3 * 2 * 2


# --- presets ----------------------------------------------------------------------------------------------------------


def test_the_benchmarks_port_sees_one_batch_and_has_no_mask() -> None:
    """ "unlearncanvas": all of the cross-attention moves, nothing else, and images after the first batch do not matter; with "canonical" they do."""
    for name, matters in (("unlearncanvas", False), ("canonical", True)):
        stage = replace(catalogue.make("unlearning", Spec.parse(PRESETS[name]), {}), steps=2, lr=1e-2, batch=2, images_per_prompt=1)
        results = []
        for last in (1, 2):
            model, task = small.pipe(), tiny.task()
            run = small.run(model, stage, task)
            run.images = {n: torch.cat([i[:2], small.pictures(len(i) - 2, last)]) for n, i in run.images.items()}
            stage(model, task, run)
            results.append(small.weights(model))
        assert bool(small.moved(*results)) is matters
        if not matters:
            before = small.weights(small.pipe())
            assert small.moved(before, results[0]) == {n for n in before if group("x")(n)}
            assert torch.cat([(before[n] != results[0][n]).flatten() for n in before if group("x")(n)]).float().mean() > 0.99
