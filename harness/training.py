"""The training loop: there is one, and it can stop and go on at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Generator, Tensor

from harness.errors import PreconditionError
from harness.spec import seed_of

Batch = TypeVar("Batch")
CARRIED = "carried."
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
    loss: Callable[[Batch], Tensor],
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
) -> None:
    """Take steps `run.start + 1 .. steps` of `optimizer` at a constant learning rate.

    Step i draws its batch from a generator of (seed, i) alone and the rate does not depend on `steps`, so
    50 steps continued to 200 equal an unbroken run of 200, bit for bit, at equal thread count.
    A loss that is not finite raises PreconditionError; `clip` bounds the gradient's L2 norm. `adjust` may edit the
    gradients before that (a mask, a projection), `after` follows the optimizer's step (an average of the weights).
    `carried` tensors are changed in place by them; they are kept with the optimizer's and filled in when going on.
    """
    moving, carried = list(parameters), carried or {}
    engine = OPTIMIZERS[optimizer](moving, lr=lr, weight_decay=weight_decay)  # type: ignore[call-arg]  # all three take both
    _restore(engine, {name: tensor for name, tensor in run.state.items() if not name.startswith(CARRIED)})
    for name, tensor in carried.items():
        if (kept := run.state.get(CARRIED + name)) is not None:
            tensor.data.copy_(kept)
    for step in range(run.start, steps):
        engine.zero_grad(set_to_none=True)
        value = loss(batch_at(run.rng("step", step)))
        if not torch.isfinite(value):
            raise PreconditionError(f"the loss became {value.item()} at step {step + 1} of {steps}; try a smaller lr than {lr}")
        value.backward()
        if run.extra is not None:
            run.extra(moving)
        if adjust is not None:
            adjust()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(moving, clip)
        engine.step()
        if after is not None:
            after()
        run.losses.append(value.item())
        run.report(step + 1, steps, run.losses[-1])
    run.state = _state(engine) | {CARRIED + name: tensor.detach().clone() for name, tensor in carried.items()}


def _state(engine: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as one flat dictionary, `<parameter index>.<name>`."""
    state = engine.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value).clone() for i, entry in state.items() for name, value in entry.items() if value is not None}


def _restore(engine: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, entry = name.split(".", 1)
        state.setdefault(int(index), {})[entry] = value.clone()
    if state:
        engine.load_state_dict({**engine.state_dict(), "state": state})
