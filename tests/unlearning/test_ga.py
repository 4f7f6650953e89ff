"""Gradient ascent: towards the noise of what is kept, away from the noise of what is forgotten."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.data import Captioned
from harness.errors import PreconditionError, SpecError
from harness.pipeline import Pipe, group
from harness.unlearning.ga import Method
from tests import tiny
from tests.unlearning import _small as small

QUICK = Method(steps=3, lr=1e-3, batch=2, images_per_prompt=1)


def terms(stage: Method, model: Pipe, task: object = None) -> tuple[Tensor, Tensor]:
    """Retain and forget loss of the first step, written without the method, on the same draws."""
    task = task or tiny.task()
    run = small.run(model, stage, task)  # type: ignore[arg-type]  # a Task
    rng, sets = run.rng("step", 0), stage.images(task)
    losses = [model.diffusion_loss(*Captioned(model, run.images[n], sets[n].prompts).batch(stage.batch, rng), rng) for n in ("retain", "forget")]
    return losses[0], losses[1]


def test_the_loss_is_what_is_kept_minus_lambda_times_what_is_forgotten() -> None:
    """Eq. 5, one step: L_DM(D_r) - lambda L_DM(D_f), for lambda 0, 1 and 2.5."""
    retain, forget = (term.item() for term in terms(QUICK, small.pipe()))
    for lam in (0.0, 1.0, 2.5):
        _, run = small.after(replace(QUICK, lam=lam, steps=1))
        assert run.losses == [pytest.approx(retain - lam * forget, rel=1e-5)]


def test_the_gradient_points_up_the_forget_loss() -> None:
    """lambda huge, one step: gradients are those of -lambda L_DM(D_f), so their product with the forget loss's own is negative and they are parallel."""
    model = small.pipe()
    moving = list(model.parameters("unet").values())
    _, forget = terms(QUICK, model)
    upwards = torch.cat([g.flatten() for g in torch.autograd.grad(forget, moving)])
    model, _ = small.after(replace(QUICK, lam=1e6, steps=1))
    found = torch.cat([p.grad.flatten() for name, p in model.named().items() if name.startswith("unet.") and p.grad is not None])
    assert torch.nn.functional.cosine_similarity(found, upwards, dim=0) == pytest.approx(-1, abs=1e-3)


def test_it_forgets_and_without_lambda_it_does_not() -> None:
    """Signature: 20 steps raise the loss on the forgotten concept's images; with lambda = 0 other weights and a lower loss come out."""
    results = {}
    for lam in (0.0, 1.0):
        model, _ = small.after(replace(QUICK, lam=lam, steps=20))
        results[lam] = small.weights(model), terms(replace(QUICK, batch=64), model)[1].item()
    start = terms(replace(QUICK, batch=64), small.pipe())[1].item()
    assert small.moved(results[0.0][0], results[1.0][0])
    assert results[1.0][1] > start
    assert results[1.0][1] > results[0.0][1]


def test_the_sum_is_the_mean_times_the_numbers_of_a_latent() -> None:
    """4 x 4 x 4 latents: summed over an image's squared errors the loss is 64 times the mean, and so is its gradient."""
    losses, gradients = [], []
    for reduction in ("mean", "sum"):
        model, run = small.after(replace(QUICK, reduction=reduction, steps=1))
        losses.append(run.losses[0])
        gradients.append(model.named()["unet.conv_in.weight"].grad)
    assert losses[1] == pytest.approx(64 * losses[0], rel=1e-5)
    assert torch.allclose(gradients[1], 64 * gradients[0], rtol=1e-3, atol=1e-5)


def test_the_gradients_norm_is_bounded_if_asked() -> None:
    """clip = 0 leaves the gradient, clip = 1e-3 makes its norm that."""
    norms = []
    for clip in (0.0, 1e-3):
        model, _ = small.after(replace(QUICK, clip=clip, steps=1))
        norms.append(torch.cat([p.grad.flatten() for p in model.named().values() if p.grad is not None]).norm().item())
    assert norms[0] > 2e-3
    assert norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_every_image_has_its_own_prompt() -> None:
    """Forget set: 2 erased names, 2 prompts, 5 images, all under their own names; retain set alike; no seed twice within a set."""
    sets = Method(images_per_prompt=5).images(tiny.task())
    assert Counter(sets["forget"].prompts) == Counter({"a x": 5, "the x": 5, "a y": 5, "the y": 5})
    assert Counter(sets["retain"].prompts) == Counter({"a k": 5, "the k": 5, "a l": 5, "the l": 5})
    assert [len(set(chosen.seeds)) for chosen in sets.values()] == [20, 20]


def test_retained_and_forgotten_are_not_confused() -> None:
    """Each step asks for retained names first and erased ones second."""
    model, task = small.pipe(), tiny.task()
    seen = small.witness(model)
    small.after(QUICK, task, model)
    texts = [[model.encode([p])[0] for name in part.concepts for p in part.asking(name)] for part in (task.retain, task.erased)]
    for i, each in enumerate(seen):
        assert all(any(torch.equal(row, text) for text in texts[i % 2]) for row in each.embeddings)


def test_a_step_costs_two_forward_and_two_backward_passes() -> None:
    """2F + 2B: one batch of each set, and a gradient flows back from both."""
    model = small.pipe()
    seen = small.witness(model)
    small.after(replace(QUICK, batch=4), model=model)
    assert model.passes == 3 * 2 * 4
    assert len(seen) == 6
    assert all(each.learns for each in seen)


def test_an_embedding_may_have_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class-conditional model's embeddings are (n, width) or labels (n,): the method hands on whatever `encode` gives, row by row."""
    model, task, asked = small.pipe(), tiny.task(), list[Tensor]()
    weight = model.parameters("unet")["unet.conv_in.weight"]
    number = {name: float(ord(name[-1])) for part in (task.erased, task.retain) for c in part.concepts for name in (c, *part.asking(c))}
    monkeypatch.setattr(model, "encode", lambda texts: torch.tensor([number.get(text, 0.0) for text in texts]))
    monkeypatch.setattr(model, "predict", lambda x, t, c: asked.append(c) or x * weight.sum())
    small.after(replace(QUICK, trains="unet"), task, model)
    assert [tuple(c.shape) for c in asked] == [(2,)] * 6
    assert {chr(int(c)) for each in asked[::2] for c in each} <= {"k", "l"}
    assert {chr(int(c)) for each in asked[1::2] for c in each} <= {"x", "y"}


@pytest.mark.parametrize("trains", ["unet", "x"])
def test_only_the_named_group_moves(trains: str) -> None:
    """The UNet by default, the cross-attention if asked; all else stays bit for bit."""
    before = small.weights(small.pipe())
    model, _ = small.after(replace(QUICK, trains=trains))
    assert small.moved(before, small.weights(model)) == {name for name in before if group(trains)(name)}


# --- requests that cannot be meant ------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["batch", "images_per_prompt"])
def test_nothing_to_train_on_is_refused(field: str) -> None:
    """No images, or none in a batch: the error names the field."""
    with pytest.raises(SpecError, match=f"`{field}` must be at least 1, got 0"):
        Method(**{field: 0})


@pytest.mark.parametrize(("name", "message"), [("", "empty prompt.*`erased`"), ("12", "empty prompt.*`erased`"), ("x" * 15, "17 tokens.*shorten")])
def test_names_that_say_nothing_or_too_much_are_refused(name: str, message: str) -> None:
    """An empty name would unlearn the templates; one past the context cannot be asked for."""
    task = replace(tiny.task(), erased=replace(tiny.task().erased, concepts=("x", name)))
    with pytest.raises(SpecError, match=message):
        small.after(QUICK, task)


def test_a_loss_that_is_not_a_number_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the prediction: an error with step and learning rate."""
    model = small.pipe()
    monkeypatch.setattr(model, "predict", lambda x, t, c: x * float("nan"))
    with pytest.raises(PreconditionError, match="nan at step 1 of 3; try a smaller lr"):
        small.after(QUICK, model=model)


def test_a_group_that_matches_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without such weights: the error names group and choices."""
    model, task, stage = small.pipe(), tiny.task(), replace(QUICK, trains="x")
    run, named = small.run(model, stage, task), {name: p for name, p in model.named().items() if not group("x")(name)}
    monkeypatch.setattr(model, "named", lambda: named)
    with pytest.raises(SpecError, match=r"'x' matches nothing .* allowed"):
        stage(model, task, run)
