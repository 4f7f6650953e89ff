"""The meta-gradient against finite differences, hand-written algebra, and a meter of memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.meta import _gradient
from harness.meta._gradient import Loss

CALM = settings(deadline=None, max_examples=25)


class Net:
    """A net of 13 weights in float64, with a forget and a retain loss on data of their own."""

    def __init__(self, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        shapes = [(3, 3), (1, 3), (1,)]
        self.parameters = [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]
        self.data = [(torch.randn(5, 3, generator=rng, dtype=torch.float64), torch.randn(5, 1, generator=rng, dtype=torch.float64)) for _ in range(3)]

    def loss(self, i: int) -> Loss:
        """Mean squared error on data set i: 0 and 1 to be forgotten, 2 retained."""
        x, y = self.data[i]
        a, b, c = self.parameters
        return lambda: (torch.tanh(x @ a.T) @ b.T + c - y).square().mean()

    def gradient(self, steps: int = 1, **how: Any) -> Tensor:
        """The gradient that `add` adds, as one row."""
        for p in self.parameters:
            p.grad = None
        _gradient.add(self.parameters, [self.loss(m % 2) for m in range(steps)], self.loss(0), self.loss(2), **{"gamma": 1.0, "zeta": 0.7, "tau": 0.1, **how})
        return flat([p.grad for p in self.parameters])


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    """All entries in one row."""
    return torch.cat([t.detach().flatten() for t in tensors if t is not None])


def grad(parameters: Sequence[Tensor], loss: Loss) -> Tensor:
    """The plain gradient of a loss."""
    return flat(torch.autograd.grad(loss(), parameters))


def meta(net: Net, at: Tensor, steps: int, zeta: float, tau: float) -> float:
    """L_meta at the weights `at`, by its definition and nothing of the code under test."""
    own = flat(net.parameters)

    def put(row: Tensor) -> None:
        with torch.no_grad():
            for p, part in zip(net.parameters, row.split([p.numel() for p in net.parameters]), strict=True):
                p.copy_(part.view_as(p))

    put(at)
    kept, moved = net.loss(2)().item(), at
    for m in range(steps):
        moved = moved - tau * grad(net.parameters, net.loss(m % 2))
        put(moved)
    value = -net.loss(0)().item() - zeta * (net.loss(2)().item() - kept)
    put(own)
    return value


def differences(net: Net, value: Callable[[Tensor], float], e: float = 1e-5) -> Tensor:
    """Central differences of a function of all weights."""
    at = flat(net.parameters)
    unit = torch.eye(len(at), dtype=torch.float64) * e
    return torch.tensor([(value(at + d) - value(at - d)) / (2 * e) for d in unit], dtype=torch.float64)


@CALM
@given(steps=st.integers(1, 3), zeta=st.floats(0, 3), tau=st.floats(0, 0.5), seed=st.integers(0, 9))
def test_exact_is_the_derivative_by_central_differences(steps: int, zeta: float, tau: float, seed: int) -> None:
    """For one to three inner steps, any zeta and tau: relative error below 1e-6."""
    net = Net(seed)
    wanted = differences(net, lambda at: meta(net, at, steps, zeta, tau))
    found = net.gradient(steps, zeta=zeta, tau=tau, order="exact")
    assert (found - wanted).norm() < 1e-6 * (1 + wanted.norm())


@pytest.mark.parametrize("steps", [1, 3])
def test_hessian_products_by_differences_agree_with_the_exact_ones(steps: int) -> None:
    """In float64 to 1e-6; and the products are not nothing: first order is off by more than 1e-3."""
    net = Net()
    exact, hvp, first = (net.gradient(steps, order=order) for order in ("exact", "hvp", "first"))
    assert (hvp - exact).norm() < 1e-6 * exact.norm()
    assert (first - exact).norm() > 1e-3 * exact.norm()


def test_first_order_tends_to_exact_with_tau() -> None:
    """The gap is O(tau): a tenth of tau, a tenth of the gap."""
    net = Net()
    gaps = [(net.gradient(tau=tau, order="first") - net.gradient(tau=tau, order="exact")).norm().item() for tau in (1e-2, 1e-3, 1e-4)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.1)
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.02)


def test_the_remainder_of_equation_4_is_quadratic_in_tau() -> None:
    """L_meta = -L_F + tau ||g_F||^2 + tau zeta <g_F, g_R> + O(tau^2): the remainder over tau^2 tends to a constant that is not 0."""
    net, zeta = Net(), 0.7
    g_f, g_r = (grad(net.parameters, net.loss(i)) for i in (0, 2))
    ratios = []
    for tau in (1e-2, 1e-3, 1e-4):
        found = _gradient.add(net.parameters, [net.loss(0)], net.loss(0), net.loss(2), gamma=1.0, zeta=zeta, tau=tau)
        equation_4 = -net.loss(0)().item() + tau * (g_f @ g_f).item() + tau * zeta * (g_f @ g_r).item()
        ratios.append((found - equation_4) / tau**2)
    assert abs(ratios[2]) > 1e-3
    assert ratios[1] == pytest.approx(ratios[2], rel=0.05)
    assert ratios[0] == pytest.approx(ratios[2], rel=0.5)


def test_m_steps_of_tau_are_one_of_m_tau_up_to_tau_squared() -> None:
    """The paper's remark under eq. 4, on one batch: the gap of L_meta shrinks a hundredfold with a tenth of tau."""
    net, gaps = Net(), []
    for tau in (1e-2, 1e-3):
        many, one = (
            _gradient.add(net.parameters, [net.loss(0)] * m, net.loss(0), net.loss(2), gamma=1.0, zeta=0.7, tau=t) for m, t in ((3, tau), (1, 3 * tau))
        )
        gaps.append(abs(many - one))
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.3)


@pytest.mark.parametrize("order", ["first", "exact", "hvp"])
def test_without_inner_steps_size_the_retain_terms_cancel(order: str) -> None:
    """tau = 0: theta' = theta, so the gradient is -gamma g_F whatever zeta is."""
    net = Net()
    found = net.gradient(tau=0.0, zeta=5.0, gamma=2.0, order=order)
    assert torch.allclose(found, -2 * grad(net.parameters, net.loss(0)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", ["first", "exact", "hvp"])
def test_zeta_minus_one_on_one_set_leaves_the_gradient_at_theta(order: str) -> None:
    """D_r = D_FT and zeta = -1: L_meta collapses to -L_F(theta), and theta' drops out."""
    net = Net()
    _gradient.add(net.parameters, [net.loss(0)], net.loss(0), net.loss(0), gamma=1.0, zeta=-1.0, tau=0.3, order=order)
    assert torch.allclose(flat([p.grad for p in net.parameters]), -grad(net.parameters, net.loss(0)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("order", ["first", "exact", "hvp"])
def test_the_weights_stay_and_the_gradient_is_added_to_what_is_there(order: str, optimizer: str) -> None:
    """Bit for bit the same weights afterwards, no hook left, and g + gamma x in place of g; also where there was no gradient."""
    net = Net()
    before, alone = [p.detach().clone() for p in net.parameters], net.gradient(order=order, gamma=0.5, optimizer=optimizer)
    own = [torch.ones_like(p) for p in net.parameters]
    for p, each in zip(net.parameters, own, strict=True):
        p.grad = each.clone()
    _gradient.add(net.parameters, [net.loss(0)], net.loss(0), net.loss(2), gamma=0.5, zeta=0.7, tau=0.1, order=order, optimizer=optimizer)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters, before, strict=True))
    assert torch.allclose(flat([p.grad for p in net.parameters]), 1 + alone)
    net.loss(0)().backward()
    assert all(torch.equal(p, old) for p, old in zip(net.parameters, before, strict=True))


def test_the_weights_come_back_when_a_loss_fails() -> None:
    """An error inside leaves theta, not theta'."""
    net = Net()
    before = [p.detach().clone() for p in net.parameters]

    def fail() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _gradient.add(net.parameters, [net.loss(0)], fail, net.loss(2), gamma=1.0, zeta=1.0, tau=0.1)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters, before, strict=True))


def test_the_first_step_of_adam_is_a_signed_step() -> None:
    """theta' = theta - tau sign(g): with Adam inside, -g_F(theta') is taken there (zeta = 0)."""
    net = Net()
    found = net.gradient(zeta=0.0, optimizer="adam", tau=1e-2)
    step = 1e-2 * grad(net.parameters, net.loss(0)).sign()
    with torch.no_grad():
        for p, part in zip(net.parameters, step.split([p.numel() for p in net.parameters]), strict=True):
            p.sub_(part.view_as(p))
    assert torch.allclose(found, -grad(net.parameters, net.loss(0)), rtol=1e-5, atol=1e-7)


# --- memory -----------------------------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """The most bytes of tensors alive at a time while it is on, on top of `held`."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in held:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.alive and size:
            self.alive[place] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, place)

    def _gone(self, place: int) -> None:
        self.now -= self.alive.pop(place, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(result):
            if isinstance(each, Tensor):
                self._see(each)
        return result


WIDTH, DEPTH = 64, 40


def peak(order: str, optimizer: str = "sgd", steps: int = 1) -> float:
    """Peak memory of two outer Adam steps on 40 layers of 64 x 64, in multiples of the weights."""
    layers = [torch.randn(WIDTH, WIDTH) for _ in range(DEPTH)]
    x = torch.randn(1, WIDTH)
    meter = Meter(layers)
    parameters = [layer.requires_grad_() for layer in layers]

    def loss() -> Tensor:
        y = x
        for p in parameters:
            y = torch.tanh(y @ p / 8)
        return y.square().mean()

    engine = torch.optim.Adam(parameters, lr=1e-4, foreach=False)
    with meter:
        for _ in range(2):
            engine.zero_grad(set_to_none=True)
            loss().backward()
            _gradient.add(parameters, [loss] * steps, loss, loss, gamma=0.1, zeta=1.0, tau=1e-3, optimizer=optimizer, order=order)
            engine.step()
    return meter.peak / (DEPTH * WIDTH * WIDTH * 4)


@pytest.mark.parametrize(
    ("order", "optimizer", "steps", "most"),
    [
        ("first", "sgd", 1, 5),
        ("first", "sgd", 3, 5),
        ("first", "momentum", 1, 7),
        ("first", "adam", 1, 8),
        ("hvp", "sgd", 1, 8),
        ("hvp", "sgd", 3, 10),
        ("exact", "sgd", 1, 8),
        ("exact", "sgd", 3, 10),
    ],
)
def test_the_peak_memory_is_what_the_docstring_says(order: str, optimizer: str, steps: int, most: int) -> None:
    """Weights 1, gradient 1, Adam 2, and the copy of the weights that the inner steps leave from: 5 in first order; four of 40 tensors of slack."""
    assert peak(order, optimizer, steps) == pytest.approx(most, abs=0.1)
