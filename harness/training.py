"""The training loop: there is one, and it can stop and go on at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from harness.devices import CHECKPOINTING, MICRO_BATCH
from harness.errors import PreconditionError
from harness.spec import seed_of

Batch = TypeVar("Batch")
CARRIED, REPAIR = "carried.", "repair."
OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@dataclass
class Run:
    """One execution of a stage: where it starts, what it may look at, and what it leaves behind.

    `images[name]` is uint8 (n, 3, h, w), drawn by the base model as the stage asked. `original` holds the weights
    of the group `trains` as the stage found them, to be used for a frozen copy (`Pipe.swapped`). `start` counts the steps
    already taken; `state` then holds what is needed to go on (the optimizer's tensors) and is replaced by what
    must be kept. A stage that adds an adapter, and so leaves the weights alone, puts its tensors in `adapter`.
    `extra` is for a stage that wraps another: it may add to the gradient of every step, before the inner stage's mask and clip.
    """

    seed: int
    images: Mapping[str, Tensor] = field(default_factory=dict)
    original: Mapping[str, Tensor] = field(default_factory=dict)
    start: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)
    extra: Callable[[list[Tensor]], object] | None = None
    losses: list[float] = field(default_factory=list)
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None

    def rng(self, *salt: int | str) -> Generator:
        """A fresh CPU generator for `salt`: same seed and salt, same draws, whatever came before."""
        return torch.Generator().manual_seed(seed_of("stage", self.seed, *salt))


def train(
    parameters: Iterable[Tensor],
    loss: Callable[[Batch], Any],
    batch_at: Callable[[Generator], Batch],
    run: Run,
    *,
    steps: int,
    lr: float,
    optimizer: str = "adam",
    weight_decay: float = 0.0,
    clip: float | None = None,
    adjust: Callable[[], object] | None = None,
    after: Callable[[], object] | None = None,
    carried: Mapping[str, Tensor] | None = None,
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None,
    repair: Callable[[Batch], Tensor] | None = None,
) -> None:
    """Take steps `run.start + 1 .. steps` of `optimizer` at a constant learning rate.

    Step i draws its batch from a generator of (seed, i) alone and the rate does not depend on `steps`, so
    50 steps continued to 200 equal an unbroken run of 200, bit for bit, at equal thread count.
    A loss that is not finite raises PreconditionError; `clip` bounds the gradient's L2 norm. `adjust` may edit the
    gradients before that (a mask, a projection), `after` follows the optimizer's step (an average of the weights).
    `carried` tensors are changed in place by them; they are kept with the optimizer's and filled in when going on.

    Two extensions for losses that disagree. With `weigh`, `loss` returns n terms on separate graphs; each is differentiated
    once, and `weigh(values (n,), gram (n, n))`, gram the inner products of their gradients, says how much each counts. `repair` is a
    second loss on the same batch: after the first one's step it takes its own, unadjusted, by an optimizer of its own, so that
    neither moves weights through the other's momentum. The loss reported is then their sum.
    """
    moving, carried = list(parameters), carried or {}

    def phase(*how: Any) -> _Phase:
        engine = OPTIMIZERS[optimizer](moving, lr=lr, weight_decay=weight_decay)  # type: ignore[call-arg]  # all three take both
        return _Phase(engine, moving, *how)

    phases = [phase(loss, "", adjust, weigh)] + ([phase(repair, REPAIR)] if repair else [])
    for each in phases:
        _restore(each.engine, _of(run.state, each.prefix))
    for name, tensor in carried.items():
        if (kept := run.state.get(CARRIED + name)) is not None:
            tensor.data.copy_(kept)
    for step in range(run.start, steps):
        batch, total = batch_at(run.rng("step", step)), 0.0
        for each in phases:
            value = _fits(each.differentiate, batch)
            if not torch.isfinite(value):
                raise PreconditionError(f"the loss became {value.item()} at step {step + 1} of {steps}; try a smaller lr than {lr}")
            if run.extra is not None and each is phases[0]:
                run.extra(moving)
            each.move(clip)
            total += value.item()
        if after is not None:
            after()
        run.losses.append(total)
        run.report(step + 1, steps, total)
    run.state = {CARRIED + name: tensor.detach().clone() for name, tensor in carried.items()}
    for each in phases:
        run.state |= {each.prefix + name: tensor for name, tensor in _state(each.engine).items()}


def _fits(differentiate: Callable[[Any], Tensor], batch: Any) -> Tensor:
    """The loss; where the device is too small for the batch, an error that says what to do. The batch itself is the stage's and stays."""
    try:
        return differentiate(batch)
    except torch.OutOfMemoryError as error:
        raise PreconditionError(f"a step does not fit into memory ({error}); set {MICRO_BATCH}=1, and {CHECKPOINTING}=1 if that is not enough") from error


@dataclass
class _Phase:
    """One loss with an optimizer of its own; `prefix` marks its state."""

    engine: torch.optim.Optimizer
    moving: Sequence[Tensor]
    loss: Callable[[Any], Any]
    prefix: str = ""
    adjust: Callable[[], object] | None = None
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None

    def differentiate(self, batch: Any) -> Tensor:
        """Fill in the gradients; returns the loss."""
        self.engine.zero_grad(set_to_none=True)
        if self.weigh is not None:
            return _weighed(self.loss(batch), self.moving, self.weigh)
        value: Tensor = self.loss(batch)
        if torch.isfinite(value):
            value.backward()
        return value

    def move(self, clip: float | None) -> None:
        """Adjust the gradients, clip them, take the step."""
        if self.adjust is not None:
            self.adjust()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.moving, clip)
        self.engine.step()


def _weighed(terms: Sequence[Tensor], moving: Sequence[Tensor], weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Fill in the gradient of the weighed sum of `terms`, one backward pass each; returns that sum."""
    gradients = [torch.autograd.grad(term, moving, allow_unused=True, materialize_grads=True) for term in terms]
    values = torch.stack([term.detach() for term in terms])
    gram = torch.stack([torch.stack([_inner(a, b) for b in gradients]) for a in gradients])
    weights = weigh(values, gram)
    for parameter, *parts in zip(moving, *gradients, strict=True):
        parameter.grad = sum((w * part for w, part in zip(weights[1:], parts[1:], strict=True)), weights[0] * parts[0])
    return (weights * values).sum()


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product of two gradients, given tensor by tensor."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one optimizer: the first one's names start with a digit."""
    if prefix:
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in state.items() if not name.startswith((CARRIED, REPAIR))}


def _state(engine: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's own tensors, with which it is done, as one flat dictionary, `<parameter index>.<name>`."""
    state = engine.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items() if value is not None}


def _restore(engine: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, entry = name.split(".", 1)
        state.setdefault(int(index), {})[entry] = value.clone()
    if state:
        engine.load_state_dict({**engine.state_dict(), "state": state})
