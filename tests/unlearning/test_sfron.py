"""SFRon: masked forgetting and repair in turn."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import mse_loss

from harness.data import Captioned
from harness.errors import SpecError
from harness.spec import Group
from harness.training import train
from harness.unlearning.sfron import Method, balance, fading
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None, max_examples=200)  # a busy machine is no failure
QUICK = Method(steps=3, lr=1e-2, batch=2, images_per_prompt=1, decay=0)
losses = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=8).map(lambda v: torch.tensor(v, dtype=torch.float64))


def masked(stage: Method, erased: str = "xy", retain: str = "kl") -> dict[str, Tensor]:
    """The mask on a fresh tiny model; each image shows its caption's seed."""
    model = small.pipe()  # a plain namespace: a task would refuse equal sets
    task: Any = SimpleNamespace(erased=Group(tuple(erased), ("a {}",)), retain=Group(tuple(retain), ("a {}",)), anchor=tiny.task().anchor)
    run = small.run(model, stage, task)
    run.images = {"forget": small.pictures(len(erased), ord(erased[0])), "retain": small.pictures(len(retain), ord(retain[0]))}
    return stage.mask(model, task, run)


# --- adaptive ascent --------------------------------------------------------------------------------------------------


@CALM
@given(values=losses, lam=st.floats(0, 5))
def test_the_weights_of_the_images_sum_to_their_number(values: Tensor, lam: float) -> None:
    """w_i = n l_i^-lam / sum_j l_j^-lam by hand; a larger loss never counts more."""
    weights, powers = balance(values, lam), values**-lam
    assert weights.sum().item() == pytest.approx(len(values))
    assert weights.tolist() == pytest.approx((len(values) * powers / powers.sum()).tolist(), rel=1e-6)
    assert weights[values.argsort()].diff().max() <= 1e-9 if len(values) > 1 else True


@CALM
@given(n=st.integers(1, 8), value=st.floats(1e-3, 1e3), lam=st.floats(0, 5), scale=st.floats(1e-3, 1e3))
def test_equal_losses_count_equally_and_the_scale_does_not_matter(n: int, value: float, lam: float, scale: float) -> None:
    """Equal l_i: w_i = 1 for any lam. A loss that is a sum over pixels weighs its images as the mean does."""
    assert balance(torch.full((n,), value), lam).tolist() == pytest.approx([1.0] * n, rel=1e-4)
    values = torch.arange(1.0, n + 1, dtype=torch.float64)
    assert balance(values, lam).tolist() == pytest.approx(balance(scale * values, lam).tolist(), rel=1e-6)


def test_without_lambda_adaptive_ascent_is_ascent() -> None:
    """lam = 0: the weights of `ga`; with lam = .5 others (signature)."""
    ga, adaga, plain = (small.weights(small.after(replace(QUICK, forget=f, lam=lam))[0]) for f, lam in (("ga", 0.5), ("adaga", 0.5), ("adaga", 0.0)))
    assert all(torch.allclose(ga[name], plain[name], atol=1e-4) for name in ga)
    assert any(not torch.allclose(ga[name], adaga[name], atol=1e-4) for name in ga)


@pytest.mark.parametrize("forget", ["ga", "adaga", "rl"])
def test_the_losses_of_a_step(forget: str) -> None:
    """Forgetting then repair, at weights that the forgetting moved; the weights w_i carry no gradient. By hand from the first forget step's gradient."""
    stage = replace(QUICK, forget=forget, gamma=0.0, steps=1, alpha_f=2.0, alpha_r=3.0)
    model, task = small.pipe(), tiny.task()
    run = small.run(model, stage, task)
    data = Captioned(model, run.images["forget"], stage.images(task)["forget"].prompts)
    retain = Captioned(model, run.images["retain"], stage.images(task)["retain"].prompts)
    rng, parameters = run.rng("step", 0), model.parameters("unet")
    chosen = torch.randint(4, (2,), generator=rng)
    x_0 = data.mean[chosen] + data.std[chosen] * torch.randn((2, *model.latent_shape), generator=rng)
    if forget == "rl":
        noise, t = torch.randn(x_0.shape, generator=rng), torch.randint(1000, (2,), generator=rng)
        x_t, anchors = model.noised(x_0, noise, t), model.encode(["a p", "the p"] * 2)
        first = 2 * mse_loss(model.predict(x_t, t, data.embeddings[chosen]), model.predict(x_t, t, anchors[chosen]).detach())
    else:
        each = model.diffusion_losses(x_0, data.embeddings[chosen], rng)
        weights = each.detach() ** -0.5
        weights = 2 * weights / weights.sum() if forget == "adaga" else torch.ones(2)
        first = -2 * (weights * each).mean()
    adam = torch.optim.Adam(parameters.values(), lr=1e-2)
    first.backward()
    adam.step()
    second = 3 * model.diffusion_loss(*retain.batch(2, rng), rng)
    stepped, mine = small.after(stage)
    assert mine.losses == [pytest.approx((first + second).item(), rel=1e-3)]
    second_adam = torch.optim.Adam(parameters.values(), lr=1e-2)
    second_adam.zero_grad()
    second.backward()
    second_adam.step()
    wanted, found = small.weights(model), small.weights(stepped)
    close = torch.cat([(wanted[n] - found[n]).abs().flatten() < 1e-3 for n in wanted]).float().mean()
    assert close > 0.995  # Adam's first step is a sign: entries near 0 may differ


# --- two steps --------------------------------------------------------------------------------------------------------


def test_without_repair_weights_outside_the_mask_keep_their_bits() -> None:
    """alpha_r = 0: theta[~m] = theta_0[~m] exactly, and most of m moves: the forget step is masked, and no momentum leaks into it."""
    stage = replace(QUICK, alpha_r=0.0)
    model, task = small.pipe(), tiny.task()
    mask = stage.mask(model, task, small.run(model, stage, task))
    before, after = small.weights(small.pipe()), small.weights(small.after(stage)[0])
    assert 0.05 < torch.cat([m.flatten() for m in mask.values()]).float().mean() < 0.95
    assert small.same({n: before[n][~m] for n, m in mask.items()}, {n: after[n][~m] for n, m in mask.items()})
    assert torch.cat([(before[n] != after[n])[m] for n, m in mask.items()]).float().mean() > 0.99


def test_the_repairs_momentum_does_not_reach_the_forget_step() -> None:
    """The forget optimizer's moments are 0 wherever the mask is, while the repair's are not."""
    stage, model, task = QUICK, small.pipe(), tiny.task()
    run = small.run(model, stage, task)
    mask = list(stage.mask(model, task, run).values())
    stage(model, task, run)
    forget = torch.cat([run.state[f"{i}.exp_avg"][~m] for i, m in enumerate(mask)])
    repair = torch.cat([run.state[f"repair.{i}.exp_avg"][~m] for i, m in enumerate(mask)])
    assert not forget.any()
    assert (repair != 0).float().mean() > 0.99


def test_without_forgetting_it_is_plain_training_on_the_retain_set() -> None:
    """alpha_f = 0: the forget step is a no-op, bit for bit; only the repair moves."""
    model, task, stage = small.pipe(), tiny.task(), replace(QUICK, alpha_f=0.0, gamma=0.0)
    run = small.run(model, stage, task)
    forget, retain = (Captioned(model, run.images[n], stage.images(task)[n].prompts) for n in ("forget", "retain"))

    def loss(rng: torch.Generator) -> Tensor:
        forget.batch(2, rng), torch.randn((2, *model.latent_shape), generator=rng), torch.randint(1000, (2,), generator=rng)
        return model.diffusion_loss(*retain.batch(2, rng), rng)

    train(model.parameters("unet").values(), loss, lambda rng: rng, run, steps=3, lr=1e-2)
    assert small.same(small.weights(model), small.weights(small.after(stage)[0]))


def test_without_both_nothing_moves() -> None:
    """alpha_f = alpha_r = 0: not one bit."""
    assert small.same(small.weights(small.pipe()), small.weights(small.after(replace(QUICK, alpha_f=0.0, alpha_r=0.0))[0]))


def test_the_repair_reaches_weights_outside_the_mask() -> None:
    """alpha_r = 1: they move too."""
    model, task = small.pipe(), tiny.task()
    mask = QUICK.mask(model, task, small.run(model, QUICK, task))
    before, after = small.weights(small.pipe()), small.weights(small.after(QUICK)[0])
    assert torch.cat([(before[n] != after[n])[~m] for n, m in mask.items()]).float().mean() > 0.99


# --- the mask ---------------------------------------------------------------------------------------------------------


def test_the_mask_is_the_ratio_of_both_sets_squared_gradients() -> None:
    """m = [F_f >= gamma F_r], F the mean over batches of the squared gradient of the guided loss. By hand, 3 images in 2 batches against 2 retained in 1."""
    stage, model = replace(QUICK, trains="x-strict", gamma=1.3, mask_guidance=2.0), small.pipe()
    task = replace(tiny.task(), erased=Group(tuple("xyz"), ("a {}",)), retain=Group(tuple("kl"), ("a {}",)))
    run = small.run(model, stage, task)
    found, fishers = stage.mask(model, task, run), []
    parameters = list(model.parameters("x-strict").values())
    for name in ("forget", "retain"):
        data, squares = Captioned(model, run.images[name], stage.images(task)[name].prompts), []
        for i, rows in enumerate((slice(0, 2), slice(2, 4))[: 2 if name == "forget" else 1]):
            rng, mean = run.rng("pass", i), data.mean[rows]
            x_0 = mean + data.std[rows] * torch.randn(mean.shape, generator=rng)
            noise, t = torch.randn(x_0.shape, generator=rng), torch.randint(1000, (len(mean),), generator=rng)
            x_t = model.noised(x_0, noise, t)
            guided = 3 * model.predict(x_t, t, data.embeddings[rows]) - 2 * model.predict(x_t, t, model.encode([""] * len(mean)))
            squares.append(torch.cat([g.flatten() ** 2 for g in torch.autograd.grad(mse_loss(guided, noise), parameters)]))
        fishers.append(torch.stack(squares).mean(0))
    agree = torch.cat([m.flatten() for m in found.values()]) == (fishers[0] >= 1.3 * fishers[1])
    assert agree.float().mean() > 0.999  # rounding of a double batch


def test_the_limits_of_gamma() -> None:
    """gamma 0: all may move; gamma huge: none; the same set on both sides and gamma 1: all."""
    assert all(m.all() for m in masked(replace(QUICK, gamma=0.0)).values())
    assert not any(m.any() for m in masked(replace(QUICK, gamma=1e30)).values())
    assert all(m.all() for m in masked(QUICK, "xy", "xy").values())


def test_swapping_both_sets_complements_the_mask() -> None:
    """gamma 1: what may move for one direction is left alone in the other, but for ties."""
    one, other = masked(QUICK, "xy", "kl"), masked(QUICK, "kl", "xy")
    opposite = torch.cat([(one[n] != other[n]).flatten() for n in one])
    assert opposite.float().mean() > 0.98
    assert 0.05 < torch.cat([m.flatten() for m in one.values()]).float().mean() < 0.95


def test_the_mask_stays_when_a_trajectory_goes_on() -> None:
    """Taken from trained weights, the mask is the one of the weights before unlearning."""
    model, task = small.pipe(), tiny.task()
    run = small.run(model, QUICK, task)
    first = QUICK.mask(model, task, run)
    QUICK(model, task, run)
    assert small.same(first, QUICK.mask(model, task, run))
    run.original = small.weights(model)
    assert small.moved(first, QUICK.mask(model, task, run))


# --- the schedule, the cost -------------------------------------------------------------------------------------------


def test_the_schedule_falls_from_1_to_0_and_stays() -> None:
    """(1 + cos(pi k / N)) / 2; without a decay always 1."""
    assert [fading(k, 4) for k in (0, 2, 4, 9)] == pytest.approx([1, 0.5, 0, 0])
    assert [fading(k, 0) for k in (0, 7)] == [1, 1]


@pytest.mark.parametrize("cut", [1, 2])
def test_the_schedule_goes_on_where_it_stopped(cut: int) -> None:
    """decay 2: stopped at 1 or 2 and continued to 3 equals 3 at once, bit for bit; another decay gives other weights."""
    stage, model, task = replace(QUICK, decay=2), small.pipe(), tiny.task()
    first = small.run(model, stage, task)
    replace(stage, steps=cut)(model, task, first)
    second = small.run(model, stage, task, start=cut, state=first.state, original=first.original)
    stage(model, task, second)
    unbroken, whole = small.after(stage)
    assert small.same(small.weights(model), small.weights(unbroken))
    assert first.losses + second.losses == whole.losses
    assert small.moved(small.weights(unbroken), small.weights(small.after(replace(stage, decay=3))[0]))


@pytest.mark.parametrize(("forget", "forward"), [("ga", 2), ("adaga", 2), ("rl", 3)])
def test_the_cost_of_mask_and_step(forget: str, forward: int) -> None:
    """2F + 2B, relabelling 3F + 2B; the mask 2F + 2B once per image of both sets, nothing with gamma 0."""
    for gamma, once in ((0.0, 0), (1.0, 2 * 8)):
        model = small.pipe()
        backwards = small.backwards(model)
        small.after(replace(QUICK, forget=forget, gamma=gamma), model=model)
        assert model.passes == once + 3 * 2 * forward
        assert sum(backwards) == once + 3 * 2 * 2


@pytest.mark.parametrize("field", ["gamma", "decay", "lam"])
def test_negative_settings_are_refused(field: str) -> None:
    """The error names the field."""
    with pytest.raises(SpecError, match=f"{field} must be at least 0, got -1"):
        replace(QUICK, **{field: -1})
