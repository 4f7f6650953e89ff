"""The gradient of a loss after fine-tuning, with respect to the weights before it.

L_meta(theta) = -L_F(theta') - zeta [L_R(theta') - L_R(theta)], where theta' is theta after M steps of size tau down L_F.
With SGD inside, u = -g_F(theta') - zeta g_R(theta') goes back through the steps, u <- u - tau H_F(theta_m) u for
m = M-1 .. 0, and the gradient is u + zeta g_R(theta). First order leaves the Hessian products out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[], Tensor]  # at the parameters' present values, with the same draws whenever it is called
Order = Literal["first", "exact", "hvp"]
INNER: Mapping[str, Callable[[Sequence[Tensor], float], torch.optim.Optimizer]] = {
    "momentum": lambda parameters, tau: torch.optim.SGD(parameters, lr=tau, momentum=0.9),
    "adam": lambda parameters, tau: torch.optim.Adam(parameters, lr=tau),
    "adamw": lambda parameters, tau: torch.optim.AdamW(parameters, lr=tau, weight_decay=1e-4),
}


def add(
    parameters: Sequence[Tensor],
    inner: Sequence[Loss],
    forget: Loss,
    retain: Loss,
    *,
    gamma: float,
    zeta: float,
    tau: float,
    optimizer: str = "sgd",
    order: Order = "first",
) -> float:
    """Add gamma times the gradient of L_meta to the parameters' own, leave their values alone, and return L_meta.

    `inner` holds L_F of each inner step, `forget` is L_F at theta', `retain` is L_R at both ends.
    """
    kept = _backward(retain, gamma * zeta)
    start = [p.detach().clone() for p in parameters]
    try:
        if order == "first":
            _descend(parameters, inner, tau, optimizer)
            lost, left = _backward(forget, -gamma), _backward(retain, -gamma * zeta)
        else:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no double backward
                lost, left = _through(parameters, start, inner, forget, retain, (gamma, zeta, tau), order)
    finally:
        _set(parameters, start)
    return -lost - zeta * (left - kept)


def _backward(loss: Loss, scale: float) -> float:
    """Add scale times the loss's gradient; the loss. A term that does not count is not computed."""
    if scale == 0:
        return 0.0
    value = loss()
    (scale * value).backward()
    return value.item()


def _descend(parameters: Sequence[Tensor], inner: Sequence[Loss], tau: float, optimizer: str = "sgd") -> None:
    """theta -> theta', the parameters' own gradients aside. Plain SGD moves each tensor as soon as its gradient is there: none is kept."""
    own = [p.grad for p in parameters]
    engine = None if optimizer == "sgd" else INNER[optimizer](parameters, tau)

    @torch.no_grad()
    def step(p: Tensor) -> None:
        if p.grad is not None:  # it has just arrived
            p.add_(p.grad, alpha=-tau)
        p.grad = None

    for p in parameters:
        p.grad = None
    hooks = [] if engine else [p.register_post_accumulate_grad_hook(step) for p in parameters]
    try:
        for loss in inner:
            loss().backward()
            if engine:
                engine.step()
                engine.zero_grad(set_to_none=True)
    finally:
        for hook in hooks:
            hook.remove()
        for p, gradient in zip(parameters, own, strict=True):
            p.grad = gradient


def _through(
    parameters: Sequence[Tensor],
    start: list[Tensor],
    inner: Sequence[Loss],
    forget: Loss,
    retain: Loss,
    scales: tuple[float, float, float],
    order: Order,
) -> tuple[float, float]:
    """Add gamma u, with u taken back through every inner step; L_F and L_R at theta'."""
    gamma, zeta, tau = scales
    trail: list[list[Tensor]] = []  # theta_0 .. theta_{M-1}
    for loss in inner:
        trail.append([p.detach().clone() for p in parameters] if trail else start)
        _descend(parameters, [loss], tau)
    lost, left = forget(), retain() if zeta else torch.zeros(())
    u = list(torch.autograd.grad(-lost - zeta * left, parameters, materialize_grads=True))
    product = _hessian_vector if order == "exact" else _differences
    for theta, loss in zip(reversed(trail), reversed(inner), strict=True):
        _set(parameters, theta)
        for each, h in zip(u, product(parameters, loss, u), strict=True):
            each.sub_(h, alpha=tau)
    for p, each in zip(parameters, u, strict=True):
        p.grad = gamma * each if p.grad is None else p.grad.add_(each, alpha=gamma)
    return lost.item(), left.item()


def _hessian_vector(parameters: Sequence[Tensor], loss: Loss, u: Sequence[Tensor]) -> Sequence[Tensor]:
    """H u by differentiating <g, u>."""
    gradient = torch.autograd.grad(loss(), parameters, create_graph=True, materialize_grads=True)
    along = sum((g * each).sum() for g, each in zip(gradient, u, strict=True))
    if not isinstance(along, Tensor) or not along.requires_grad:  # the loss is linear
        return [torch.zeros_like(p) for p in parameters]
    return torch.autograd.grad(along, parameters, materialize_grads=True)


@torch.no_grad()
def _differences(parameters: Sequence[Tensor], loss: Loss, u: Sequence[Tensor]) -> Sequence[Tensor]:
    """H u = [g(theta + e u) - g(theta - e u)] / 2e, with e u of relative length eps^(1/3), the best for central differences."""
    length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in u])).item()
    if length == 0:
        return [torch.zeros_like(p) for p in parameters]
    size = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p) for p in parameters])).item()
    e = torch.finfo(parameters[0].dtype).eps ** (1 / 3) * max(size, 1.0) / length
    for p, each in zip(parameters, u, strict=True):
        p.add_(each, alpha=e)
    with torch.enable_grad():
        result = list(torch.autograd.grad(loss(), parameters, materialize_grads=True))
    for p, each in zip(parameters, u, strict=True):
        p.sub_(each, alpha=2 * e)
    with torch.enable_grad():
        other = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    return [up.sub_(down).div_(2 * e) for up, down in zip(result, other, strict=True)]


@torch.no_grad()
def _set(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
