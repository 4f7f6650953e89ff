"""Scissorhands: trim by connection sensitivity, then repair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from harness.data import Captioned
from harness.errors import SpecError
from harness.pipeline import group
from harness.training import train
from harness.unlearning.shs import Method, projected
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None, max_examples=200)  # a busy machine is no failure
QUICK = Method(steps=3, lr=1e-2, batch=2, images_per_prompt=1, sparsity=0.9, trim_batches=2)


def trimmed(stage: Method, seed: int = 0) -> dict[str, Tensor]:
    """The weights after the trim alone."""
    model = small.pipe()
    stage.trim(model, tiny.task(), small.run(model, stage, tiny.task(), seed=seed))
    return small.weights(model)


# --- the trim ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trims", ["unet", "selfattn", "x"])
def test_as_many_weights_start_afresh_as_score_above_the_threshold(trims: str) -> None:
    """Scores by hand, s = |w| sum_b |grad L_DM(D_f batch b)|, ranked over the whole UNet: above the quantile and inside `trims` weights
    change, elsewhere not a bit.
    """
    stage, model, task = replace(QUICK, trims=trims), small.pipe(), tiny.task()
    run = small.run(model, stage, task)
    data, parameters = Captioned(model, run.images["forget"], stage.images(task)["forget"].prompts), model.parameters("unet")
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(2):
        rng = run.rng("trim", i)
        model.unet.zero_grad()
        model.diffusion_loss(*data.batch(2, rng), rng).backward()
        for name, p in parameters.items():
            sums[name] += p.grad.abs()
    scores = {name: sums[name] * p.detach().abs() for name, p in parameters.items()}
    threshold = torch.cat([s.flatten() for s in scores.values()]).quantile(0.9)
    before, after = small.weights(small.pipe()), trimmed(stage)
    wrong, count = 0, 0
    for name in (n for n in before if before[n].dim() > 1):  # norms that are 1 and biases that are 0 start afresh as what they were
        expected = (scores[name] > threshold) if name in scores and group(trims)(name) else torch.zeros_like(before[name], dtype=torch.bool)
        wrong, count = wrong + int((expected != (before[name] != after[name])).sum()), count + int(expected.sum())
    assert count > 20
    assert wrong <= 0.01 * count  # rounding at the threshold


@pytest.mark.parametrize(("reinit", "std"), [("kaiming", None), ("normal", 0.02)])
def test_fresh_weights_come_from_the_named_distribution(reinit: str, std: float | None) -> None:
    """kaiming: uniform within sqrt(6 / fan_in), so a standard deviation of sqrt(2 / fan_in); normal: .02, cut at 2 of them; norms 1, biases 0."""
    stage = replace(QUICK, reinit=reinit)
    new = stage._fresh("some.weight", torch.empty(200, 50), Generator().manual_seed(0))
    assert new.std() == pytest.approx(0.88 * std if std else (2 / 50) ** 0.5, rel=0.03)
    assert new.abs().max() <= (2 * std if std else (6 / 50) ** 0.5)
    assert stage._fresh("norm.weight", torch.empty(3), Generator()).tolist() == [1, 1, 1]
    assert stage._fresh("norm.bias", torch.empty(3), Generator()).tolist() == [0, 0, 0]


def test_nothing_starts_afresh_at_sparsity_1() -> None:
    """The threshold is the largest score, and only what is above it is trimmed; at 0 nearly every matrix entry is."""
    before = small.weights(small.pipe())
    assert small.same(before, trimmed(replace(QUICK, sparsity=1.0)))
    after = trimmed(replace(QUICK, sparsity=0.0))
    matrices = [n for n in before if group("unet")(n) and before[n].dim() > 1]
    assert torch.cat([(before[n] != after[n]).flatten() for n in matrices]).float().mean() > 0.99


def test_the_same_seed_trims_the_same() -> None:
    """Another seed draws other batches and other fresh weights."""
    assert small.same(trimmed(QUICK, 1), trimmed(QUICK, 1))
    assert small.moved(trimmed(QUICK, 1), trimmed(QUICK, 2))


def test_a_trim_outside_of_what_is_trained_is_refused() -> None:
    """trains x, trims selfattn: the error names both fields."""
    with pytest.raises(SpecError, match=r"trims 'selfattn' .* trains 'x'"):
        small.after(replace(QUICK, trains="x", trims="selfattn"))


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}])
def test_nothing_is_trimmed_that_would_not_be_repaired(change: dict[str, float]) -> None:
    """No steps, or steps of no length: the model stays."""
    assert small.same(small.weights(small.pipe()), small.weights(small.after(replace(QUICK, **change))[0]))


@pytest.mark.parametrize("project", ["no", "retain"])
def test_the_trim_happens_once(project: str) -> None:
    """1 step continued to 3 equals 3 at once, bit for bit: going on does not trim again."""
    model, task, stage = small.pipe(), tiny.task(), replace(QUICK, project=project)
    first = small.run(model, replace(stage, steps=1), task)
    original = first.original
    replace(stage, steps=1)(model, task, first)
    second = small.run(model, stage, task, start=1, state=first.state, original=original)
    stage(model, task, second)
    unbroken, whole = small.after(stage)
    assert small.same(small.weights(model), small.weights(unbroken))
    assert small.same(second.state, whole.state)


# --- the repair -------------------------------------------------------------------------------------------------------


def test_without_lambda_the_repair_is_plain_training_on_the_retain_set() -> None:
    """lam = 0: trim, then L_DM(D_r) with the same draws, bit for bit; with lam = .1 not."""
    model, task = small.pipe(), tiny.task()
    run = small.run(model, QUICK, task)
    QUICK.trim(model, task, run)
    data = Captioned(model, run.images["retain"], QUICK.images(task)["retain"].prompts)
    train(model.parameters("unet").values(), lambda rng: model.diffusion_loss(*data.batch(2, rng), rng), lambda rng: rng, run, steps=3, lr=1e-2)
    assert small.same(small.weights(model), small.weights(small.after(replace(QUICK, lam=0.0))[0]))
    assert small.moved(small.weights(model), small.weights(small.after(QUICK)[0]))


@pytest.mark.parametrize(("forget", "forward", "backward"), [("relabel", 3, 2), ("ascend", 2, 2)])
@pytest.mark.parametrize("project", ["no", "retain", "forget"])
def test_the_cost_of_trim_and_step(forget: str, forward: int, backward: int, project: str) -> None:
    """The trim 1F + 1B a batch; a step 3F + 2B relabelling or 2F + 2B ascending, projected or not."""
    model = small.pipe()
    backwards = small.backwards(model)
    small.after(replace(QUICK, forget=forget, project=project), model=model)
    assert model.passes == 2 * 2 + 3 * 2 * forward
    assert sum(backwards) == 2 * 2 + 3 * 2 * backward


def test_the_two_repair_losses() -> None:
    """relabel: MSE to the anchor's prediction, added; ascend: the erased images' diffusion loss, subtracted. By hand from the passes of one step."""
    for forget in ("relabel", "ascend"):
        model = small.pipe()
        seen = small.witness(model)
        stage = replace(QUICK, forget=forget, lam=0.7, steps=1, sparsity=1.0, trim_batches=1)
        plain = {}
        _, run = small.after(stage, model=model)
        rest = seen[2:]  # after the trim and the retain term
        again = small.run(model, stage, tiny.task())
        rng = again.rng("step", 0)
        fresh = small.pipe()
        sets = stage.images(tiny.task())
        retain, erased = (Captioned(fresh, again.images[n], sets[n].prompts) for n in ("retain", "forget"))
        plain["kept"] = fresh.diffusion_loss(*retain.batch(2, rng), rng).item()
        if forget == "relabel":
            target, student = rest
            assert not target.learns
            expected = plain["kept"] + 0.7 * (student.out - target.out).square().mean().item()
        else:
            expected = plain["kept"] - 0.7 * fresh.diffusion_loss(*erased.batch(2, rng), rng).item()
        assert run.losses == [pytest.approx(expected, rel=1e-5)]


# --- the projection ---------------------------------------------------------------------------------------------------

vectors = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=2).map(lambda v: torch.tensor(v, dtype=torch.float64))


@CALM
@given(g_r=vectors, g_f=vectors, memory=st.integers(0, 1))
def test_the_projected_gradient_is_the_nearest_that_does_not_conflict(g_r: Tensor, g_f: Tensor, memory: int) -> None:
    """<g~, m> >= 0, g~ = g where <g, m> >= 0, and no point of the half-plane, searched by brute force, is nearer to g."""
    both = torch.stack([g_r, g_f])
    weights = projected(both @ both.T, memory)
    g, new, m = both.sum(0), weights @ both, both[memory]
    assert new @ m >= -1e-6 * (1 + g.norm() * m.norm())
    if g @ m >= 0:
        assert torch.equal(weights, torch.ones(2, dtype=torch.float64))
    if m.norm() > 1e-3:
        angles = torch.linspace(0, 2 * torch.pi, 721, dtype=torch.float64)
        around = new + 0.1 * (1 + g.norm()) * torch.stack([angles.cos(), angles.sin()], 1)
        allowed = around[around @ m >= 0]
        assert ((allowed - g).norm(dim=1) >= (new - g).norm() - 1e-6).all()


@pytest.mark.parametrize("project", ["retain", "forget"])
def test_the_step_follows_the_projected_gradient(project: str) -> None:
    """Ascending conflicts with the memory of the retain term if it is strong, with that of the forget term if it is weak: the gradient that
    steps is then orthogonal to the memory's, and is g where nothing is projected.
    """
    stage, model, task = replace(QUICK, forget="ascend", lam=50.0 if project == "retain" else 0.01, sparsity=1.0, steps=1), small.pipe(), tiny.task()
    for seed in range(20):  # until the two sets pull apart
        stage = replace(stage, seed=seed)
        run, parameters = small.run(model, stage, task), model.parameters("unet")
        terms = stage._terms(model, task, run)(run.rng("step", 0))
        grads = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(term, list(parameters.values()))]) for term in terms])
        memory = grads[0 if project == "retain" else 1]
        if conflict := bool(grads.sum(0) @ memory < -0.1 * memory @ memory):
            break
    assert conflict
    for kind, expected in (("no", grads.sum(0)), (project, grads.sum(0) - (grads.sum(0) @ memory) / (memory @ memory) * memory)):
        after, _ = small.after(replace(stage, project=kind))
        stepped = torch.cat([p.grad.flatten() for n, p in after.named().items() if n in parameters])
        assert (stepped - expected).norm() < 1e-4 * expected.norm()
