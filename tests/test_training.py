"""The one training loop."""

from __future__ import annotations

import pytest
import torch

from harness.errors import PreconditionError
from harness.training import OPTIMIZERS, Run, train

START = (1.0, -2.0, 0.5)


def fit(run: Run, steps: int, start=START, **how) -> torch.Tensor:
    """A weight vector after `steps` steps towards random points."""
    weight = torch.tensor(start, requires_grad=True)
    train([weight], lambda point: (weight - point).square().sum(), lambda rng: torch.randn(3, generator=rng), run, steps=steps, lr=0.1, **how)
    return weight.detach()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_resumed_run_equals_an_unbroken_one(optimizer, cut):
    """Weights and state after 10 steps are the same bits whether or not the run stopped on the way."""
    unbroken, first = Run(seed=1), Run(seed=1)
    expected = fit(unbroken, 10, optimizer=optimizer, weight_decay=0.1, clip=1.0)
    middle = fit(first, cut, optimizer=optimizer, weight_decay=0.1, clip=1.0)
    second = Run(seed=1, start=cut, state=first.state)
    assert torch.equal(expected, fit(second, 10, start=middle.tolist(), optimizer=optimizer, weight_decay=0.1, clip=1.0))
    assert unbroken.losses == first.losses + second.losses
    assert unbroken.state.keys() == second.state.keys()
    assert all(torch.equal(tensor, second.state[name]) for name, tensor in unbroken.state.items())


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_resuming_needs_the_optimizers_state(optimizer):
    """The control of the test above: weights alone do not continue Adam."""
    middle = fit(Run(seed=1), 4, optimizer=optimizer)
    assert not torch.equal(fit(Run(seed=1), 10, optimizer=optimizer), fit(Run(seed=1, start=4), 10, start=middle.tolist(), optimizer=optimizer))


def test_the_state_is_a_flat_dictionary_of_tensors():
    """Adam's state after 3 steps, as a safetensors file can hold it."""
    run = Run(seed=1)
    fit(run, 3)
    assert {"0.step", "0.exp_avg", "0.exp_avg_sq"} == set(run.state)
    assert run.state["0.step"].item() == 3
    assert all(isinstance(value, torch.Tensor) for value in run.state.values())


def test_the_given_state_is_not_written_to():
    """Resuming twice from one state gives the same result twice."""
    first = Run(seed=1)
    middle = fit(first, 4).tolist()
    once, twice = (fit(Run(seed=1, start=4, state=first.state), 8, start=middle) for _ in range(2))
    assert torch.equal(once, twice)
    assert first.state["0.step"].item() == 4


@pytest.mark.parametrize("steps", [0, 4])
def test_no_step_left_changes_nothing(steps):
    """A run that has its steps already leaves the weights and keeps the state."""
    first = Run(seed=1)
    fit(first, steps)
    again = Run(seed=1, start=steps, state=first.state)
    assert torch.equal(torch.tensor(START), fit(again, steps))
    assert first.state.keys() == again.state.keys()
    assert all(torch.equal(tensor, again.state[name]) for name, tensor in first.state.items())


def test_clip_bounds_the_gradients_norm():
    """A gradient of norm 10 moves the weights by the clip; a short one by its own length."""

    def moved(clip: float | None) -> float:
        weight = torch.zeros(2, requires_grad=True)
        train([weight], lambda g: weight @ g, lambda rng: torch.tensor([6.0, 8.0]), Run(0), steps=1, lr=1.0, optimizer="sgd", clip=clip)
        return weight.detach().norm().item()

    assert moved(None) == pytest.approx(10)
    assert moved(0.5) == pytest.approx(0.5, rel=1e-5)
    assert moved(20) == pytest.approx(10)


def test_weight_decay_reaches_the_optimizer():
    """SGD without a gradient shrinks the weights by lr times weight decay."""
    weight = torch.tensor([2.0], requires_grad=True)
    train([weight], lambda _: 0 * weight.sum(), lambda rng: None, Run(0), steps=1, lr=0.1, optimizer="sgd", weight_decay=0.5)
    assert weight.item() == pytest.approx(2 * (1 - 0.05))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(bad):
    """The error says where, and which learning rate to lower; the weights do not become NaN."""
    weight, factors = torch.ones(1, requires_grad=True), iter([1.0, 1.0, bad])
    with pytest.raises(PreconditionError, match=r"(nan|inf) at step 3 of 5; try a smaller lr than 0.25"):
        train([weight], lambda f: f * weight.sum(), lambda rng: next(factors), Run(0), steps=5, lr=0.25, optimizer="sgd")
    assert weight.item() == 0.5


def test_batches_depend_on_seed_and_absolute_step_only():
    """Step i draws the same batch whatever the run's length or start; another seed draws another."""

    def batches(run: Run, steps: int) -> list[float]:
        seen: list[float] = []
        weight = torch.zeros(1, requires_grad=True)
        train([weight], lambda x: weight.sum() * x, lambda rng: seen.append(torch.rand((), generator=rng).item()) or seen[-1], run, steps=steps, lr=0.1)
        return seen

    whole = batches(Run(seed=1), 6)
    assert len(set(whole)) == 6
    assert batches(Run(seed=1), 3) == whole[:3]
    assert batches(Run(seed=1, start=3), 6) == whole[3:]
    assert not set(whole) & set(batches(Run(seed=2), 6))


def test_a_generator_is_the_same_for_the_same_salt():
    """`Run.rng` does not remember what was drawn before."""
    run = Run(seed=3)
    first = torch.rand(4, generator=run.rng("a", 1))
    run.rng("b")
    assert torch.equal(first, torch.rand(4, generator=run.rng("a", 1)))
    assert not torch.equal(first, torch.rand(4, generator=run.rng("a", 2)))
    assert not torch.equal(first, torch.rand(4, generator=Run(seed=4).rng("a", 1)))


def test_every_step_is_reported():
    """Step, steps and loss, from the first step that is taken on."""
    lines: list[tuple[int, int, float]] = []
    run = Run(seed=1, start=2, report=lambda *line: lines.append(line))
    fit(run, 5)
    assert [line[:2] for line in lines] == [(3, 5), (4, 5), (5, 5)]
    assert run.losses == [line[2] for line in lines]


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_carried_average_survives_a_stop(cut):
    """An average kept by `after` is the same bits whether or not the run stopped on the way; without it, it is not."""

    def averaged(run: Run, steps: int, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, mean = start.clone().requires_grad_(), torch.zeros(3)
        train(
            [weight],
            lambda point: (weight - point).square().sum(),
            lambda rng: torch.randn(3, generator=rng),
            run,
            steps=steps,
            lr=0.1,
            after=lambda: mean.lerp_(weight.detach(), 0.1),
            carried={"mean": mean},
        )
        return weight.detach(), mean

    expected = averaged(Run(seed=1), 10, torch.tensor(START))
    first = Run(seed=1)
    middle, _ = averaged(first, cut, torch.tensor(START))
    found = averaged(Run(seed=1, start=cut, state=first.state), 10, middle)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    forgetful = {name: tensor for name, tensor in first.state.items() if name != "carried.mean"}
    assert not torch.equal(expected[1], averaged(Run(seed=1, start=cut, state=forgetful), 10, middle)[1])


def test_adjusted_gradients_are_the_ones_that_step():
    """`adjust` runs after the backward pass and before the step: a zeroed entry stays where it was."""
    weight = torch.tensor(START, requires_grad=True)
    train([weight], lambda point: (weight - point).square().sum(), lambda rng: torch.randn(3, generator=rng), Run(seed=1), steps=3, lr=0.1,
          adjust=lambda: weight.grad[0].zero_())  # fmt: skip
    assert weight[0] == START[0]
    assert (weight.detach() != torch.tensor(START))[1:].all()


# --- losses that disagree ---------------------------------------------------------------------------------------------


def test_terms_are_weighed_by_values_and_inner_products_of_their_gradients():
    """Two quadratics in two tensors, by hand: what `weigh` sees, the gradient that steps, and the loss that is reported; one backward pass a term."""
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    unused, seen, passes, run = torch.ones(2, requires_grad=True), [], [], Run(0)
    a.register_hook(lambda gradient: passes.append(gradient))

    def weigh(values, gram):
        seen.append((values.tolist(), gram.tolist()))
        return torch.tensor([2.0, -0.5])

    def terms(_):
        return (a * a).sum() + b.sum(), 3 * a.sum() - (b * b).sum()  # gradients (2, 4; 1) and (3, 3; -6)

    train([a, b, unused], terms, lambda rng: None, run, steps=1, lr=0.1, optimizer="sgd", weigh=weigh)
    assert seen == [([8.0, 0.0], [[21.0, 12.0], [12.0, 54.0]])]
    assert a.tolist() == pytest.approx([1 - 0.1 * (4 - 1.5), 2 - 0.1 * (8 - 1.5)])
    assert b.tolist() == pytest.approx([3 - 0.1 * (2 + 3)])
    assert unused.tolist() == [1, 1]
    assert run.losses == [16.0]
    assert len(passes) == 2


@pytest.mark.parametrize("bad", ["term", "weight"])
def test_a_weighed_loss_that_is_not_finite_stops_the_run(bad):
    """Whether a term or its weight is NaN, the weights stay."""
    weight = torch.ones(1, requires_grad=True)
    factor, share = (float("nan"), 1.0) if bad == "term" else (1.0, float("nan"))
    with pytest.raises(PreconditionError, match="nan at step 1 of 2"):
        train([weight], lambda _: (weight.sum(), factor * weight.sum()), lambda rng: None, Run(0), steps=2, lr=0.1,
              weigh=lambda values, gram: torch.tensor([1.0, share]))  # fmt: skip
    assert weight.item() == 1


def alternate(run: Run, steps: int, start=START, **how) -> torch.Tensor:
    """As `fit`, with a repair step towards zero of half the batch's size after each step."""
    weight = torch.tensor(start, requires_grad=True)
    train([weight], lambda point: (weight - point).square().sum(), lambda rng: torch.randn(3, generator=rng), run, steps=steps, lr=0.1,
          repair=lambda point: (weight - point / 2).square().sum(), **how)  # fmt: skip
    return weight.detach()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_repair_step_follows_each_step_with_an_optimizer_of_its_own(optimizer):
    """The same bits as two optimizers stepped in turn by hand; the loss reported is the sum of both."""
    run, weight = Run(seed=1), torch.tensor(START, requires_grad=True)
    engines = [OPTIMIZERS[optimizer]([weight], lr=0.1, weight_decay=0.0) for _ in range(2)]
    expected = []
    for step in range(5):
        point, total = torch.randn(3, generator=run.rng("step", step)), 0.0
        for engine, wanted in zip(engines, (point, point / 2), strict=True):
            engine.zero_grad()
            loss = (weight - wanted).square().sum()
            loss.backward()
            engine.step()
            total += loss.item()
        expected.append(total)
    assert torch.equal(weight.detach(), alternate(run, 5, optimizer=optimizer))
    assert run.losses == expected


@pytest.mark.parametrize("cut", [1, 4])
def test_repair_steps_survive_a_stop(cut):
    """Weights and both optimizers are the same bits whether or not the run stopped; without the repair's state they are not."""
    unbroken, first = Run(seed=1), Run(seed=1)
    expected, middle = alternate(unbroken, 8), alternate(first, cut).tolist()
    second = Run(seed=1, start=cut, state=first.state)
    assert torch.equal(expected, alternate(second, 8, middle))
    assert unbroken.state.keys() == second.state.keys()
    assert all(torch.equal(tensor, second.state[name]) for name, tensor in unbroken.state.items())
    for gone in ("repair.", "0."):
        forgetful = {name: tensor for name, tensor in first.state.items() if not name.startswith(gone)}
        assert not torch.equal(expected, alternate(Run(seed=1, start=cut, state=forgetful), 8, middle))


def test_the_repair_is_not_adjusted():
    """An entry that `adjust` holds still in the first step is moved by the repair alone: as without the first step's loss."""
    held, alone = torch.tensor(START, requires_grad=True), torch.tensor(START, requires_grad=True)
    draw = lambda rng: torch.randn(3, generator=rng)  # noqa: E731
    train([held], lambda p: (held[0] - p[0]).square() + (held - p).square()[1:].sum(), draw, Run(seed=1), steps=4, lr=0.1,
          adjust=lambda: held.grad[0].zero_(), repair=lambda p: (held - p / 2).square().sum())  # fmt: skip
    train([alone], lambda p: (alone - p / 2).square().sum(), draw, Run(seed=1), steps=4, lr=0.1)
    assert held[0] == alone[0] != START[0]
    assert (held.detach() != alone.detach())[1:].all()
