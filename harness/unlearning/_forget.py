"""What the methods that relabel, trim or mask have in common: their data, the relabelling loss, scores of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from harness.data import Captioned
from harness.errors import PreconditionError, SpecError
from harness.pipeline import Pipe
from harness.spec import ImageSet
from harness.training import Run

Order = Literal["all", "first"]  # draw from all images, or from the first batch alone, as code that restarts its loader at every step does


def image_sets(task: Any, per_prompt: int, seed: int) -> dict[str, ImageSet]:
    """D_f, the erased concepts, and D_r, the concepts to retain; both drawn by the base model."""
    roles = {"forget": ("erased", task.erased), "retain": ("retain", task.retain)}
    sets = {name: ImageSet.of(group, per_prompt, seed) for name, (_, group) in roles.items()}
    for name, (role, _) in roles.items():
        if not sets[name].prompts:
            raise SpecError(f"no image to {name}: list concepts and prompts in the task's [{role}] and let images_per_prompt be at least 1, got {per_prompt}")
    return sets


def load(pipe: Pipe, task: Any, run: Run, sets: Mapping[str, ImageSet], first: int | None = None) -> tuple[Captioned, Captioned]:
    """D_f and D_r as latents. D_f's embeddings are (n, 2, ...): each caption, and the same caption with the anchor's name.

    `first` keeps only so many images of each set.
    """
    few = slice(first)
    forget = Captioned(pipe, run.images["forget"][few], sets["forget"].prompts[few])
    forget.embeddings = torch.stack([forget.embeddings, pipe.encode(renamed(task, sets["forget"])[few])], 1)
    return forget, Captioned(pipe, run.images["retain"][few], sets["retain"].prompts[few])


def renamed(task: Any, forget: ImageSet) -> list[str]:
    """The captions of `forget` with the anchor's concepts for the erased ones, in turn where they are several."""
    targets, anchors, prompts = task.erased.concepts, task.anchor.concepts, task.erased.prompts
    each = len(forget.prompts) // (len(targets) * len(prompts))
    chosen = [anchors[i % len(anchors)] for i in range(len(targets))]
    if same := [target for target, anchor in zip(targets, chosen, strict=True) if target.casefold() == anchor.casefold()]:
        raise SpecError(f"'{same[0]}' is to become '{same[0]}': the task's anchor must differ from what is erased; name another concept in [anchor]")
    return [prompt.replace("{}", anchor) for anchor in chosen for prompt in prompts for _ in range(each)]


def relabelled(pipe: Pipe, x_0: Tensor, embeddings: Tensor, rng: Generator) -> Callable[[], Tensor]:
    """MSE(eps(x_t, t, c_f), sg[eps(x_t, t, c_a)]) as a function of the weights to come; its target is taken now, without gradient.

    `embeddings` holds the pairs (c_f, c_a) of `load`. Both predictions are the model's own output: on a v-prediction model
    they are the same target, and timestep t weighs 1 / alpha_bar_t as much.
    """
    c_f, c_a = embeddings.unbind(1)
    noise = torch.randn(x_0.shape, generator=rng).to(x_0)
    t = torch.randint(pipe.schedule.config.num_train_timesteps, (len(x_0),), generator=rng).to(pipe.device)
    x_t = pipe.noised(x_0, noise, t)
    with torch.no_grad():
        wanted = pipe.predict(x_t, t, c_a)
    return lambda: mse_loss(pipe.predict(x_t, t, c_f), wanted)


def guided_loss(pipe: Pipe, w: float, x_0: Tensor, c: Tensor, rng: Generator) -> Tensor:
    """L_DM of the guided prediction (1 + w) eps(c) - w eps(""): both halves in one batch."""
    noise = torch.randn(x_0.shape, generator=rng).to(x_0)
    t = torch.randint(pipe.schedule.config.num_train_timesteps, (len(x_0),), generator=rng).to(pipe.device)
    x_t = pipe.noised(x_0, noise, t)
    null = pipe.encode([""] * len(x_0))
    eps_c, eps_null = pipe.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([c, null])).chunk(2)
    velocity = pipe.schedule.config.prediction_type == "v_prediction"
    return mse_loss((1 + w) * eps_c - w * eps_null, pipe.schedule.get_velocity(x_0, noise, t) if velocity else noise)


def one_pass(data: Captioned, size: int, run: Run) -> Iterator[tuple[Tensor, Tensor, Generator]]:
    """Every image once, in order, in batches of at most `size`: latents, embeddings and a generator of the batch's own."""
    parts = zip(data.mean.split(size), data.std.split(size), data.embeddings.split(size), strict=True)
    for i, (mean, std, embeddings) in enumerate(parts):
        rng = run.rng("pass", i)
        yield mean + std * torch.randn(mean.shape, generator=rng).to(mean), embeddings, rng


def accumulate(
    pipe: Pipe,
    run: Run,
    trains: str,
    batches: Iterable[tuple[Tensor, Tensor, Generator]],
    loss: Callable[[Tensor, Tensor, Generator], Tensor],
    fold: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Sum over batches of `fold(gradient)`, at the weights before unlearning: the same wherever a trajectory goes on."""
    chosen = pipe.parameters(trains)
    sums = {name: torch.zeros_like(parameter) for name, parameter in chosen.items()}
    with pipe.swapped(run.original):
        for batch in batches:
            with torch.enable_grad():
                value = loss(*batch)
                if not torch.isfinite(value):
                    raise PreconditionError(f"the loss that scores the weights is {value.item()} before any step; are the base model and its images sound?")
                gradients = torch.autograd.grad(value, list(chosen.values()), allow_unused=True, materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += fold(gradient)
    return {name: total.detach() for name, total in sums.items()}


def above(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """True for the 1 - sparsity of all entries with the largest scores; fewer where scores tie at the threshold."""
    flat = torch.cat([score.flatten().cpu() for score in scores.values()]).numpy()
    below = math.ceil(sparsity * len(flat) - 1e-6)  # 0.1 * 30 is not 3
    if below:
        flat.partition(below - 1)  # in place and without indices: 860 M entries stay 3.4 GB
    threshold = float(flat[below - 1]) if below else -math.inf
    return {name: score > threshold for name, score in scores.items()}


def hold(parameters: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> Callable[[], None]:
    """Zero the gradient where `mask` is False: under an optimizer that starts without momentum these weights keep their bits."""

    def adjust() -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~mask[name], 0)

    return adjust


def check_share(name: str, value: float) -> None:
    """Refuse a share outside [0, 1], by the name of its field."""
    if not 0 <= value <= 1:
        raise SpecError(f"{name} is the share of weights left alone and must lie in [0, 1], got {value}; 0 leaves none, 1 leaves all")
