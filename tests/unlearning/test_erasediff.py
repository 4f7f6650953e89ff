"""EraseDiff: forgetting as a constraint, with an inner level."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from harness.data import Captioned
from harness.pipeline import group
from harness.training import Run, train
from harness.unlearning import _forget
from harness.unlearning.erasediff import Method
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None, max_examples=200)  # a busy machine is no failure
QUICK = Method(steps=3, lr=1e-2, batch=2, images_per_prompt=1)
vectors = st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3).map(lambda v: torch.tensor(v, dtype=torch.float64))


def setting(stage: Method) -> tuple:
    """A tiny model, the stage's run on it, D_f with both captions and D_r."""
    model, task = small.pipe(), tiny.task()
    run = small.run(model, stage, task)
    return model, run, *_forget.load(model, task, run, stage.images(task))


# --- lambda -----------------------------------------------------------------------------------------------------------


@CALM
@given(kept=vectors, forgotten=vectors, eta=st.floats(0, 5))
def test_the_gradient_barrier_descends_on_the_constraint(kept: Tensor, forgotten: Tensor, eta: float) -> None:
    """d = g_r + lambda g_q has <d, g_q> >= eta ||g_q||^2, with equality unless lambda = 0; lambda is 0 where g_r alone descends enough."""
    both = torch.stack([kept, forgotten])
    one, lam = Method(barrier="gradient", eta=eta).weigh(torch.ones(2), both @ both.T)
    square = (forgotten @ forgotten).item()
    assert one == 1
    assert lam >= 0
    if square > 1e-6:
        descent = (kept + lam * forgotten) @ forgotten
        assert descent >= eta * square - 1e-6 * (1 + square)
        if kept @ forgotten >= eta * square:
            assert lam.item() == pytest.approx(0, abs=1e-9)
        else:
            assert descent.item() == pytest.approx(eta * square, rel=1e-6, abs=1e-6)


@CALM
@given(kept=vectors, forgotten=vectors, eta=st.floats(0, 5), q=st.floats(-1, 5))
def test_the_value_barrier_descends_as_far_as_the_constraint_is_violated(kept: Tensor, forgotten: Tensor, eta: float, q: float) -> None:
    """<d, g_q> = max(eta q, <g_r, g_q>): nothing is asked where q = 0."""
    both = torch.stack([kept, forgotten])
    _, lam = Method(barrier="value", eta=eta).weigh(torch.tensor([1.0, q], dtype=torch.float64), both @ both.T)
    if forgotten @ forgotten > 1e-6:
        assert ((kept + lam * forgotten) @ forgotten).item() == pytest.approx(max(eta * q, (kept @ forgotten).item()), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("barrier", ["gradient", "value"])
def test_a_constraint_without_a_gradient_weighs_nothing(barrier: str) -> None:
    """g_q = 0: lambda = 0, not infinite."""
    assert Method(barrier=barrier).weigh(torch.ones(2), torch.tensor([[3.0, 0.0], [0.0, 0.0]])).tolist() == [1, 0]


def test_bilevel_steps_on_a_convex_toy() -> None:
    """min |a - (1, 0)|^2 subject to a minimising (a_2 - 2)^2: BOME's steps, by hand in 2-D, end at (1, 2)."""
    a, start = torch.zeros(2, requires_grad=True), torch.tensor([1.0, 0.0])

    def terms(_: None) -> tuple[Tensor, Tensor]:
        return (a - start).square().sum(), (a[1] - 2).square() - 0.0  # the least f is 0

    reference, method = torch.zeros(2), Method(barrier="gradient", eta=0.5)
    for _ in range(200):
        g_r, g_q = 2 * (reference - start), torch.tensor([0.0, 2 * (reference[1] - 2)])
        lam = max(0.0, (0.5 * g_q @ g_q - g_r @ g_q).item() / max((g_q @ g_q).item(), 1e-30))
        reference = reference - 0.05 * (g_r + lam * g_q)
    train([a], terms, lambda rng: None, Run(0), steps=200, lr=0.05, optimizer="sgd", weigh=method.weigh)
    assert a.tolist() == pytest.approx(reference.tolist(), abs=1e-3)
    assert a.tolist() == pytest.approx([1, 2], abs=0.05)


# --- the inner level --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", ["unet", "x"])
def test_the_inner_copy_is_minimised_and_the_weights_stay(trains: str) -> None:
    """f(theta^K) < f(theta), the copy is of the trained group alone, and theta is the same bits in the same storage."""
    model, run, forget, _ = setting(QUICK)
    rng = run.rng("step", 0)
    parameters = model.parameters(trains)
    f = _forget.relabelled(model, *forget.batch(2, rng), rng)
    before, storage = small.weights(model), {n: p.data_ptr() for n, p in parameters.items()}
    copied: list[set[str]] = []
    swapped = model.swapped
    model.swapped = lambda tensors: copied.append(set(tensors)) or swapped(tensors)  # type: ignore[method-assign]
    start = f().item()
    for steps in (0, 1, 3):
        least = replace(QUICK, inner_steps=steps, lr=1e-5)._least(model, f)
        assert least < start if steps else least == start
        assert small.same(before, small.weights(model))
    assert {n: p.data_ptr() for n, p in parameters.items()} == storage
    assert copied == [set(parameters)] * 3


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the modules that the search through memory touches
def test_no_second_unet_is_kept() -> None:
    """In and after a bilevel run there is one UNet."""
    model, counts = small.pipe(), set()
    kind = type(model.unet)
    gc.collect()
    before = sum(isinstance(each, kind) for each in gc.get_objects())
    model.unet.register_forward_hook(lambda *_: counts.add(sum(isinstance(each, kind) for each in gc.get_objects())))
    small.after(replace(QUICK, steps=1), model=model)
    assert counts == {before}


@pytest.mark.parametrize(("barrier", "matters"), [("value", True), ("gradient", False), ("constant", False)])
def test_only_the_value_barrier_lets_the_inner_level_move_a_weight(barrier: str, matters: bool) -> None:
    """K = 0 and K = 3 part under `value`; elsewhere f(theta^K) is a constant and the weights are the same bits."""
    results = [small.weights(small.after(replace(QUICK, barrier=barrier, inner_steps=k, lr=1e-3))[0]) for k in (0, 3)]
    assert bool(small.moved(*results)) is matters


def test_the_inner_optimizer_leaves_no_trace_in_the_outer_ones() -> None:
    """eta 0 and no conflict ask for no forgetting: the moments after a step with K = 0 and with K = 3 are the same bits."""
    runs = [small.after(replace(QUICK, eta=0.0, inner_steps=k, steps=2))[1] for k in (0, 3)]
    assert small.same(runs[0].state, runs[1].state)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_with_lambda_0_the_outer_step_is_plain_training_on_the_retain_set() -> None:
    """constant, lam = 0: bit for bit ordinary training with the same draws; with lam = 1 not."""
    model, run, forget, retain = setting(QUICK)

    def loss(rng: Generator) -> Tensor:
        x_0, c = retain.batch(2, rng)
        forget.batch(2, rng), torch.randn((2, *model.latent_shape), generator=rng), torch.randint(1000, (2,), generator=rng)
        return model.diffusion_loss(x_0, c, rng)

    train(model.parameters("unet").values(), loss, lambda rng: rng, run, steps=3, lr=1e-2)
    plain = small.weights(model)
    assert small.same(plain, small.weights(small.after(replace(QUICK, barrier="constant", lam=0.0))[0]))
    assert small.moved(plain, small.weights(small.after(replace(QUICK, barrier="constant"))[0]))


def test_the_published_form_is_the_sum_with_a_constant_lambda() -> None:
    """L = L_r + lam f, f to the anchor's prediction by the same weights, from the passes of a step: target, retain, student."""
    model = small.pipe()
    seen = small.witness(model)
    _, run = small.after(replace(QUICK, barrier="constant", lam=0.3, steps=1), model=model)
    target, kept, student = seen
    assert [each.learns for each in seen] == [False, True, True]
    assert torch.equal(target.x_t, student.x_t)
    fresh, again, forget, retain = setting(QUICK)
    rng = again.rng("step", 0)
    x_0, c = retain.batch(2, rng)
    f = _forget.relabelled(fresh, *forget.batch(2, rng), rng)
    expected = fresh.diffusion_loss(x_0, c, rng) + 0.3 * f()
    assert torch.equal(kept.embeddings, c)
    assert run.losses == [pytest.approx(expected.item(), rel=1e-5)]
    assert f().item() == pytest.approx((student.out - target.out).square().mean().item(), rel=1e-5)
    names = {n: fresh.encode([p.replace("{}", n) for p in tiny.task().erased.prompts]) for n in "xyp"}
    assert all(any(torch.equal(row, text) for text in names["p"]) for row in target.embeddings)
    assert all(any(torch.equal(row, text) for n in "xy" for text in names[n]) for row in student.embeddings)


@pytest.mark.parametrize(("barrier", "forward", "backward"), [("constant", 3, 2), ("gradient", 3, 2), ("value", 3 + 3, 2 + 2)])
def test_the_cost_of_a_step(barrier: str, forward: int, backward: int) -> None:
    """3F + 2B; the value barrier adds (K + 1)F + K B, here with K = 2."""
    model = small.pipe()
    backwards = small.backwards(model)
    small.after(replace(QUICK, barrier=barrier), model=model)
    assert model.passes == 3 * 2 * forward
    assert sum(backwards) == 3 * 2 * backward


@pytest.mark.parametrize("barrier", ["value", "gradient", "constant"])
def test_only_the_named_group_moves(barrier: str) -> None:
    """trains x: the cross-attention and nothing else."""
    before = small.weights(small.pipe())
    model, _ = small.after(replace(QUICK, trains="x", barrier=barrier))
    assert small.moved(before, small.weights(model)) == {name for name in before if group("x")(name)}


@pytest.mark.parametrize("barrier", ["gradient", "constant"])
def test_a_trajectory_goes_on_in_either_form(barrier: str) -> None:
    """1 step continued to 3 equals 3 at once, bit for bit (the default form is in the contract)."""
    stage, model, task = replace(QUICK, barrier=barrier), small.pipe(), tiny.task()
    first = small.run(model, stage, task)
    replace(stage, steps=1)(model, task, first)
    second = small.run(model, stage, task, start=1, state=first.state)
    stage(model, task, second)
    unbroken, whole = small.after(stage)
    assert small.same(small.weights(model), small.weights(unbroken))
    assert small.same(second.state, whole.state)


def test_images_are_captioned_as_drawn() -> None:
    """D_f's first caption is its prompt, the second the anchor's; D_r's its prompt."""
    model, _, forget, retain = setting(QUICK)
    sets = QUICK.images(tiny.task())
    assert torch.equal(forget.embeddings[:, 0], model.encode(sets["forget"].prompts))
    assert torch.equal(forget.embeddings[:, 1], model.encode([p.replace("x", "p").replace("y", "p") for p in sets["forget"].prompts]))
    assert isinstance(retain, Captioned)
    assert torch.equal(retain.embeddings, model.encode(sets["retain"].prompts))
