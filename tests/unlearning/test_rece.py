"""RECE: what an edit left behind is found in closed form and edited away, with one matrix for all layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.errors import PreconditionError, SpecError
from harness.pipeline import group
from harness.spec import Task
from harness.unlearning import uce
from harness.unlearning.rece import Method, derived, squares
from harness.unlearning.uce import edit
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None, max_examples=50)  # a busy machine is no failure
SEEDS, WEIGHTS, COUNTS = st.integers(0, 10_000), st.floats(0.05, 5), st.integers(1, 4)
KV = group("unet.xattn_kv")
DIM = 6
EYE = torch.eye(DIM, dtype=torch.float64)
CONVENTIONS = pytest.mark.parametrize("ridge_to", ["current", "original"])


def vectors(seed: int, *counts: int) -> list[Tensor]:
    """Random float64 matrices (count, DIM)."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(count, DIM, generator=rng, dtype=torch.float64) for count in counts]


def close(a: Tensor, b: Tensor, atol: float = 1e-8) -> bool:
    """Equal in float64 up to the condition of the system."""
    return bool(torch.allclose(a, b, rtol=0, atol=atol * max(1.0, b.abs().max().item())))


def asking(*erased: str, anchor: str = "p") -> Task:
    """The tiny task with other names."""
    task = tiny.task()
    return replace(task, erased=replace(task.erased, concepts=erased), anchor=replace(task.anchor, concepts=(anchor,)))


# --- the derived embedding --------------------------------------------------------------------------------------------


@CALM
@given(seed=SEEDS, n=COUNTS, gamma=WEIGHTS)
def test_the_derived_embedding_is_the_stacked_ridge_least_squares(seed: int, n: int, gamma: float) -> None:
    """c' minimises sum_l ||W_l c' - W_l^old c||^2 + gamma ||c'||^2: numpy solves the stack [W_1; ..; W_L; sqrt(gamma) I] c' = [W_1^old c; ..; 0]."""
    m, c, *old = vectors(seed, DIM, n, 4, 5, 3)
    stack = np.concatenate([*((w @ m).numpy() for w in old), np.sqrt(gamma) * np.eye(DIM)])
    wanted = np.concatenate([*((w @ c.T).numpy() for w in old), np.zeros((DIM, n))])
    expected = torch.from_numpy(np.linalg.lstsq(stack, wanted, rcond=None)[0].T)
    assert close(derived(m, squares(old), c, gamma), expected)


@CALM
@given(seed=SEEDS, n=COUNTS)
def test_without_gamma_the_edit_is_undone(seed: int, n: int) -> None:
    """gamma = 0 and M invertible: M c' = c, so every layer gives the embedding c' what it gave the concept."""
    m, c, *old = vectors(seed, DIM, n, 4, 5)
    m = EYE + 0.3 * torch.linalg.qr(m)[0]  # invertible: singular values above 0.7
    found = derived(m, squares(old), c, 0.0)
    assert close(found @ m.T, c, atol=1e-6)


@CALM
@given(seed=SEEDS, n=COUNTS, gamma=WEIGHTS)
def test_on_an_unedited_model_gamma_only_shrinks(seed: int, n: int, gamma: float) -> None:
    """M = I: c' = (S + gamma I)^-1 S c, shorter than c."""
    c, *old = vectors(seed, n, 4, 5)
    gram = squares(old)
    found = derived(EYE, gram, c, gamma)
    assert close(found.T, torch.linalg.solve(gram + gamma * EYE, gram @ c.T))
    assert (found.norm(dim=1) < c.norm(dim=1)).all()


@CALM
@given(seed=SEEDS, gamma=st.floats(0.01, 10), factor=st.floats(1.1, 10))
def test_a_larger_gamma_gives_a_shorter_embedding(seed: int, gamma: float, factor: float) -> None:
    """The norm of a ridge solution falls strictly with its weight."""
    m, c, *old = vectors(seed, DIM, 1, 4, 5)
    short, long = (derived(m, squares(old), c, g).norm() for g in (gamma * factor, gamma))
    assert short < long


def test_a_singular_system_is_refused() -> None:
    """gamma = 0 with 4 rows for 6 numbers: the error names gamma, also where rounding hides the missing rank."""
    for seed in range(5):
        m, c, w = vectors(seed, DIM, 1, 4)
        with pytest.raises(PreconditionError, match="`gamma`"):
            derived(m, squares([w]), c, 0.0)


# --- the matrix -------------------------------------------------------------------------------------------------------


@CONVENTIONS
@CALM
@given(seed=SEEDS, n=st.integers(1, 2), epochs=st.integers(0, 2), a=WEIGHTS, b=WEIGHTS, lam=WEIGHTS, lam_r=WEIGHTS, gamma=WEIGHTS)
def test_every_epoch_is_the_stacked_ridge_least_squares(
    ridge_to: Any, seed: int, n: int, epochs: int, a: float, b: float, lam: float, lam_r: float, gamma: float
) -> None:
    """Layer by layer, written with numpy and the weights: an edit minimises a sum ||W c - V c*||^2 + b sum ||W k - V k||^2 + lam ||W - V||^2, V being
    the current W and c is c' (`current`), or V is the original and c are the concept and every c' so far (`original`); the result is W_old M.
    """
    c, c_star, kept, prompts, wanted, *old = (each.numpy() for each in vectors(seed, n, n, 2, 3, 3, 4, 8))

    def fit(v: np.ndarray, moved: np.ndarray, to: np.ndarray, ridge: float) -> np.ndarray:
        left = np.concatenate([np.sqrt(a) * moved, np.sqrt(b) * kept, np.sqrt(ridge) * np.eye(DIM)])
        right = np.concatenate([np.sqrt(a) * to, np.sqrt(b) * kept, np.sqrt(ridge) * np.eye(DIM)]) @ v.T
        return np.linalg.lstsq(left, right, rcond=None)[0].T

    now, moved, to = [fit(v, c, c_star, lam) for v in old], c, c_star
    for _ in range(epochs):
        stack, aim = np.concatenate([*now, np.sqrt(gamma) * np.eye(DIM)]), np.concatenate([*(v @ prompts.T for v in old), np.zeros((DIM, 3))])
        found = np.linalg.lstsq(stack, aim, rcond=None)[0].T
        moved, to = np.concatenate([moved, found]), np.concatenate([to, wanted])
        now = [fit(w, found, wanted, lam_r) if ridge_to == "current" else fit(v, moved, to, lam_r) for w, v in zip(now, old, strict=True)]

    method = Method(epochs, gamma, ridge_to, lam_r, erase=a, preserve=b, ridge=lam)
    tensors = [torch.from_numpy(each) for each in (c, c_star, kept, prompts, wanted)]
    m = method.matrix(*tensors, [torch.from_numpy(v) for v in old])
    assert all(close(torch.from_numpy(v) @ m, torch.from_numpy(w), atol=1e-6) for v, w in zip(old, now, strict=True))


@CONVENTIONS
def test_concepts_that_are_their_own_guides_change_nothing(ridge_to: Any) -> None:
    """c* = c and the derived embedding of an unedited model with gamma -> 0 is c itself: M = I throughout."""
    c, kept, *old = vectors(0, 2, 2, 4, 5)
    m = Method(2, 1e-12, ridge_to).matrix(c, c, kept, c, c, old)
    assert close(m, EYE, atol=1e-9)
    assert torch.equal(Method(0).matrix(c, c, kept, c, c, old), EYE)


def test_the_two_conventions_part() -> None:
    """With something to erase, where the ridge pulls decides M: from the first epoch on."""
    c, c_star, kept, *old = vectors(0, 2, 2, 2, 4, 5)
    for epochs in (1, 2):
        one, two = (Method(epochs, 0.1, ridge_to).matrix(c, c_star, kept, c, c_star, old) for ridge_to in ("current", "original"))  # type: ignore[arg-type]
        assert not close(one, two, atol=1e-3)


# --- the weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["tail", "last"])
@pytest.mark.parametrize("prompts", ["name", "task"])
def test_without_epochs_it_is_uce(tokens: Any, prompts: Any) -> None:
    """epochs = 0: bit for bit UCE's model, every field of the edit handed on."""
    fields: dict[str, Any] = {"guide": "q", "tokens": tokens, "prompts": prompts, "erase": 2.0, "preserve": 0.3, "ridge": 0.7}
    one, other = (small.after(stage)[0] for stage in (Method(epochs=0, **fields), uce.Method(**fields)))
    assert small.same(small.weights(one), small.weights(other))


@CONVENTIONS
def test_every_layer_is_multiplied_by_the_same_matrix(ridge_to: Any) -> None:
    """Eight K/V matrices, 80 stacked rows of 16 numbers: least squares finds one M, and each layer alone is W_old M; the rest stays bit for bit."""
    everything = small.weights(small.pipe())
    before = {name: w for name, w in everything.items() if KV(name)}
    model, run = small.after(Method(ridge_to=ridge_to))
    after = small.weights(model, KV)
    old, new = (torch.cat(list(w.values())).double() for w in (before, after))
    m = torch.linalg.lstsq(old, new).solution
    assert len(before) == 8
    assert all(torch.allclose(before[name].double() @ m, after[name].double(), rtol=0, atol=1e-5) for name in before)
    assert (m - torch.eye(16)).norm() > 1e-2
    assert small.moved(everything, small.weights(model)) == set(before)
    assert (model.passes, run.losses, run.state, Method().images(tiny.task())) == (0, [], {}, {})


def test_the_edit_of_the_model_is_the_formula_on_whole_prompts() -> None:
    """One epoch: c' of all 16 positions of "x" and of "y" goes to the same position of "p", while all of "", "k" and "l" is kept."""
    model = small.pipe()
    old = [w.double() for w in small.weights(model, KV).values()]
    at = lambda *names: model.encode(names).double().flatten(0, 1)  # noqa: E731  # a name for one expression
    first = uce.Method()
    c, c_star = first.moved(model, [("x", "p"), ("y", "p")])
    m = edit(c, c_star, at("", "k", "l"), 1.0, 0.1, 0.5)
    found = derived(m, squares(old), at("x", "y"), 0.3)
    assert len(found) == 32
    m = m @ edit(found, at("p", "p"), at("", "k", "l"), 1.0, 0.1, 0.2)
    before = small.weights(model, KV)
    small.after(Method(epochs=1, gamma=0.3, rece_ridge=0.2), model=model)
    assert all(torch.allclose(model.named()[name], (w.double() @ m).float(), rtol=0, atol=1e-6) for name, w in before.items())


@CONVENTIONS
def test_what_still_meant_the_concept_to_uces_model_no_longer_does(ridge_to: Any) -> None:
    """Signature: c', found against UCE's model for "x", brings that model within a tenth of the old keys and values of "x"; one epoch takes it ten times
    farther from them than it was, and less than half as far from those of the guide.
    """
    model, task = small.pipe(), asking("x")
    x, p = model.encode(["x", "p"]).double()
    old = [w.double() for w in small.weights(model, KV).values()]
    c, c_star = uce.Method().moved(model, [("x", "p")])
    kept = uce.Method().kept(model, ("k", "l"))
    m = edit(c, c_star, kept, 1.0, 0.1, 0.5)
    found = derived(m, squares(old), x, 1e-6)
    way = lambda model, to: sum(((w.double() @ found.T - v @ to.T) ** 2).sum().item() for w, v in zip(model.values(), old, strict=True))  # noqa: E731
    one, other = (small.weights(small.after(stage, task)[0], KV) for stage in (uce.Method(), Method(1, 1e-6, ridge_to)))
    assert way(one, x) < 0.1 * way(one, p)
    assert way(other, x) > 10 * way(one, x)
    assert way(other, p) < 0.5 * way(one, p)


@pytest.mark.parametrize("field", ["gamma", "rece_ridge", "ridge", "erase", "preserve"])
def test_every_weight_counts(field: str) -> None:
    """Ten times a weight is another model."""
    results = [small.weights(small.after(Method(**{field: factor * getattr(Method(), field)}))[0], KV) for factor in (1, 10)]  # type: ignore[arg-type]
    assert small.moved(*results) == set(results[0])


@CONVENTIONS
def test_erasing_in_another_order_gives_the_same_model(ridge_to: Any) -> None:
    """x then y is y then x, up to rounding."""
    one, other = (small.after(Method(ridge_to=ridge_to), asking(*names))[0] for names in (("x", "y"), ("y", "x")))
    assert all(torch.allclose(p, other.named()[name], rtol=0, atol=1e-5) for name, p in one.named().items())


# --- requests that cannot be meant ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (asking("x", "y"), {"guide": "Y"}, "'y' and the guide 'Y' are the same; choose another `guide`"),
        (asking("x", ""), {}, "empty prompt; name another in the task's `erased`"),
        (asking("12"), {"tokens": "last"}, "empty prompt"),
        (asking("x" * 15), {}, "17 tokens .* shorten"),
    ],
)
def test_names_that_cannot_be_told_apart_or_read_are_refused(task: Task, fields: dict[str, Any], message: str) -> None:
    """As in UCE; the weights stay."""
    model, before = small.pipe(), small.weights(small.pipe())
    with pytest.raises(SpecError, match=message):
        small.after(Method(**fields), task, model)
    assert small.same(before, small.weights(model))


def test_epochs_below_zero_are_refused() -> None:
    """The error names the field."""
    with pytest.raises(SpecError, match="`epochs` must be at least 0"):
        Method(epochs=-1)


def test_weights_that_are_not_numbers_are_refused() -> None:
    """NaN in one matrix spoils the derived embeddings for all: it stops before any weight is touched."""
    model = small.pipe()
    name, weight = next(iter(small.weights(model, KV).items()))
    model.named()[name].data.fill_(float("nan"))
    before = small.weights(model, KV)
    with pytest.raises(PreconditionError, match="not finite"):
        small.after(Method(), model=model)
    assert small.moved(before, small.weights(model, KV)) <= {name}
    assert weight.isfinite().all()


def test_a_model_without_cross_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that matches nothing: the error names it and what there is."""
    model, task = small.pipe(), tiny.task()
    run, named = small.run(model, Method(), task), {name: p for name, p in model.named().items() if not KV(name)}
    monkeypatch.setattr(model, "named", lambda: named)
    with pytest.raises(SpecError, match=r"'unet.xattn_kv' matches nothing .* allowed"):
        Method()(model, task, run)
