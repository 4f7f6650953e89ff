"""UCE: one matrix, from one linear system, for every key and value of the cross-attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.errors import PreconditionError, SpecError
from harness.pipeline import group
from harness.unlearning.uce import Method, edit, last_word, multiply, solved
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None, max_examples=50)  # a busy machine is no failure
SEEDS, WEIGHTS, COUNTS = st.integers(0, 10_000), st.floats(0.05, 5), st.integers(1, 5)
KV = group("unet.xattn_kv")
DIM = 6


def vectors(seed: int, *counts: int, d: int = DIM) -> list[Tensor]:
    """Random float64 matrices (count, d)."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(count, d, generator=rng, dtype=torch.float64) for count in counts]


def close(a: Tensor, b: Tensor, atol: float = 1e-9) -> bool:
    """Equal in float64 up to the condition of the system."""
    return bool(torch.allclose(a, b, rtol=0, atol=atol))


def asking(*erased: str, anchor: str = "p", retain: tuple[str, ...] = ("k", "l")) -> object:
    """The tiny task with other names."""
    task = tiny.task()
    return replace(
        task, erased=replace(task.erased, concepts=erased), anchor=replace(task.anchor, concepts=(anchor,)), retain=replace(task.retain, concepts=retain)
    )


# --- the matrix -------------------------------------------------------------------------------------------------------


@CALM
@given(seed=SEEDS, n=COUNTS, m=st.integers(0, 5), a=WEIGHTS, b=WEIGHTS, lam=WEIGHTS)
def test_the_edit_is_the_stacked_ridge_least_squares(seed: int, n: int, m: int, a: float, b: float, lam: float) -> None:
    """W minimises a sum ||W c - W0 c*||^2 + b sum ||W k - W0 k||^2 + lam ||W - W0||^2: numpy solves the rows
    sqrt(a) C W^T = sqrt(a) C* W0^T, sqrt(b) K W^T = sqrt(b) K W0^T, sqrt(lam) W^T = sqrt(lam) W0^T, and gets W0 M. m = 0 preserves nothing.
    """
    c, c_star, kept, w0 = vectors(seed, n, n, m, 4)
    left = np.concatenate([np.sqrt(a) * c.numpy(), np.sqrt(b) * kept.numpy(), np.sqrt(lam) * np.eye(DIM)])
    right = np.concatenate([np.sqrt(a) * c_star.numpy(), np.sqrt(b) * kept.numpy(), np.sqrt(lam) * np.eye(DIM)]) @ w0.numpy().T
    solution = np.linalg.lstsq(left, right, rcond=None)[0].T
    assert close(w0 @ edit(c, c_star, kept, a, b, lam), torch.from_numpy(solution))


def test_one_vector_moves_as_far_as_a_hand_computes() -> None:
    """c = e1, c* = e2, a = 1, lam = 1, nothing kept: M = (I + e2 e1^T)(I + e1 e1^T)^-1, so M e1 = (e1 + e2) / 2 and M e2 = e2."""
    e1, e2 = torch.eye(2, dtype=torch.float64)[:, None]
    m = edit(e1, e2, torch.zeros(0, 2, dtype=torch.float64), 1.0, 0.1, 1.0)
    assert close(m, torch.tensor([[0.5, 0.0], [0.5, 1.0]], dtype=torch.float64), atol=1e-15)


@CALM
@given(seed=SEEDS, n=COUNTS, m=st.integers(0, 5))
def test_concepts_that_guide_themselves_change_nothing(seed: int, n: int, m: int) -> None:
    """C* = C: both brackets of M are the same matrix, so M = I, bit for bit; and so it is where no concept is named at all."""
    c, kept = vectors(seed, n, m)
    eye, nothing = torch.eye(DIM, dtype=torch.float64), vectors(0, 0)[0]
    assert torch.equal(edit(c, c, kept, 1.0, 0.1, 0.5), eye)
    assert torch.equal(edit(nothing, nothing, kept, 1.0, 0.1, 0.5), eye)


@CALM
@given(seed=SEEDS, n=COUNTS)
def test_an_endless_ridge_leaves_the_weights(seed: int, n: int) -> None:
    """M - I = a (C* - C)^T C (lam I + ...)^-1, so ||M - I|| <= a ||C* - C|| ||C|| / lam, and a tenfold lam shrinks it about tenfold."""
    c, c_star = vectors(seed, n, n)
    eye, nothing = torch.eye(DIM, dtype=torch.float64), vectors(0, 0)[0]
    sizes = [(edit(c, c_star, nothing, 1.0, 0.1, lam) - eye).norm().item() for lam in (1e6, 1e7, 1e8)]
    assert all(size <= (c_star - c).norm() * c.norm() / lam * (1 + 1e-6) for size, lam in zip(sizes, (1e6, 1e7, 1e8), strict=True))
    assert sizes[0] / sizes[1] == pytest.approx(10, rel=1e-2)
    assert sizes[1] / sizes[2] == pytest.approx(10, rel=1e-2)


@CALM
@given(seed=SEEDS, n=st.integers(1, 2), m=st.integers(0, 2))
def test_orthogonal_vectors_are_mapped_exactly_as_before(seed: int, n: int, m: int) -> None:
    """v orthogonal to every c and k: the second bracket maps v to lam v and so does the first, so M v = v."""
    c, c_star, kept = vectors(seed, n, n, m)
    space = torch.linalg.svd(torch.cat([c, kept]))[2][n + m :]
    assert len(space) == DIM - n - m
    assert close(edit(c, c_star, kept, 1.0, 0.1, 0.5) @ space.T, space.T)


@CALM
@given(seed=SEEDS, n=st.integers(1, 3))
def test_without_ridge_and_preservation_concepts_become_their_guides(seed: int, n: int) -> None:
    """lam, b -> 0 with independent c: the erase term alone can be zero, so M c = c*."""
    c, c_star, kept = vectors(seed, n, n, 2)
    c = torch.linalg.qr(c.T)[0].T  # independent, and well so
    assert close(edit(c, c_star, kept, 1.0, 0.0, 1e-9) @ c.T, c_star.T, atol=1e-6)


@CALM
@given(seed=SEEDS, n=st.integers(1, 3), m=st.integers(0, 4))
def test_the_change_has_no_more_rank_than_erased_vectors(seed: int, n: int, m: int) -> None:
    """M - I = a (C* - C)^T C (...)^-1 passes through n coordinates: at most n singular values are not zero."""
    c, c_star, kept = vectors(seed, n, n, m)
    values = torch.linalg.svdvals(edit(c, c_star, kept, 1.0, 0.1, 0.5) - torch.eye(DIM, dtype=torch.float64))
    assert values[0] > 1e-3
    assert values[n:].max() < 1e-12 * values[0] + 1e-13


@CALM
@given(seed=SEEDS, n=COUNTS, m=COUNTS, order=st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_matter(seed: int, n: int, m: int, order: object) -> None:
    """Sums of outer products do not know their order."""
    c, c_star, kept = vectors(seed, n, n, m)
    i, j = order.sample(range(n), n), order.sample(range(m), m)  # type: ignore[attr-defined]  # a random.Random
    assert close(edit(c[i], c_star[i], kept[j], 1.0, 0.1, 0.5), edit(c, c_star, kept, 1.0, 0.1, 0.5))


@CALM
@given(seed=SEEDS, n=COUNTS, m=COUNTS, a=WEIGHTS, b=WEIGHTS, lam=WEIGHTS, scale=st.floats(0.1, 10))
def test_only_the_ratio_of_the_three_weights_matters(seed: int, n: int, m: int, a: float, b: float, lam: float, scale: float) -> None:
    """A common factor of a, b and lam cancels between the two brackets; a factor of a alone does not."""
    c, c_star, kept = vectors(seed, n, n, m)
    m0 = edit(c, c_star, kept, a, b, lam)
    assert close(edit(c, c_star, kept, scale * a, scale * b, scale * lam), m0)
    assert not close(edit(c, c_star, kept, 2 * a, b, lam), m0, atol=1e-6)


@CALM
@given(seed=SEEDS, n=COUNTS, m=COUNTS, a=WEIGHTS)
def test_naming_a_concept_twice_doubles_its_weight(seed: int, n: int, m: int, a: float) -> None:
    """Every term is a sum over vectors: C twice with weight a is C once with 2 a."""
    c, c_star, kept = vectors(seed, n, n, m)
    assert close(edit(torch.cat([c, c]), torch.cat([c_star, c_star]), kept, a, 0.1, 0.5), edit(c, c_star, kept, 2 * a, 0.1, 0.5))


@CALM
@given(seed=SEEDS, n=st.integers(1, DIM - 1))
def test_a_singular_system_is_refused(seed: int, n: int) -> None:
    """lam = 0 with fewer vectors than dimensions leaves a direction that nothing determines, also where rounding hides it."""
    c, c_star, nothing = vectors(seed, n, n, 0)
    with pytest.raises(PreconditionError, match="`ridge`"):
        edit(c, c_star, nothing, 1.0, 0.1, 0.0)


@CALM
@given(seed=SEEDS)
def test_a_system_without_ridge_is_solved_where_the_vectors_determine_it(seed: int) -> None:
    """lam = 0 with d orthogonal vectors: M c = c* for every one of them."""
    c, c_star, nothing = vectors(seed, DIM, DIM, 0)
    c = torch.linalg.qr(c)[0]
    assert close(edit(c, c_star, nothing, 1.0, 0.1, 0.0) @ c.T, c_star.T)


@pytest.mark.parametrize("diagonal", [(1.0, -1.0), (-1.0, 1.0), (0.0, 1.0), (1.0, 1e-17), (float("nan"), 1.0), (1.0, float("nan"))])
def test_a_system_that_is_not_positive_definite_names_the_weight(diagonal: tuple[float, float]) -> None:
    """A negative, vanishing or missing number on the diagonal: the error says which weight to raise."""
    system = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    with pytest.raises(PreconditionError, match="`weight`"):
        solved(system, torch.eye(2, dtype=torch.float64), "weight")


@CALM
@given(seed=SEEDS)
def test_two_edits_after_each_other_are_not_one(seed: int) -> None:
    """M of both concepts at once differs from M_1 M_2; with orthogonal vectors, targets and nothing kept they are the same."""
    both = torch.linalg.qr(vectors(seed, DIM)[0])[0]
    nothing = vectors(0, 0)[0]
    how = (nothing, 1.0, 0.1, 0.5)
    (c, c_star), (e, e_star) = both[:4].split(2), vectors(seed, 2, 2)
    for concepts, targets, alike in ((c, c_star, True), (e, e_star, False)):
        one, two = (edit(concepts[i : i + 1], targets[i : i + 1], *how) for i in (0, 1))
        assert close(one @ two, edit(concepts, targets, *how)) is alike


# --- the weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["tail", "last"])
def test_every_layer_is_multiplied_by_the_same_matrix(tokens: str) -> None:
    """Eight K/V matrices read 16 numbers each: their 6 x 8 + 2 x 16 = 80 stacked rows determine one M by least squares, and each alone is W_old M;
    the two square ones give it alone, as W_old^+ W_new.
    """
    before = small.weights(small.pipe(), KV)
    model, _ = small.after(Method(tokens=tokens))
    after = small.weights(model, KV)
    old, new = (torch.cat(list(w.values())).double() for w in (before, after))
    m = torch.linalg.lstsq(old, new).solution
    assert len(before) == 8
    assert torch.linalg.matrix_rank(old) == 16
    assert all(torch.allclose(before[name].double() @ m, after[name].double(), rtol=0, atol=1e-6) for name in before)
    square = [torch.linalg.solve(before[name].double(), after[name].double()) for name in before if "mid_block" in name]
    assert len(square) == 2
    assert torch.allclose(square[0], square[1], rtol=0, atol=1e-3)
    assert (m - torch.eye(16)).norm() > 1e-2


def test_the_edit_of_the_model_is_the_formula_on_its_text_embeddings() -> None:
    """`last`, one letter a name: c = position 1 of "x" and "y", c* = position 1 of "p" twice, kept = position 1 of "k" and "l"."""
    model = small.pipe()
    at = lambda *names: torch.stack([model.encode([name])[0, 1] for name in names]).double()  # noqa: E731  # a name for one expression
    m = edit(at("x", "y"), at("p", "p"), at("k", "l"), 2.0, 0.3, 0.7)
    before = small.weights(model, KV)
    small.after(Method(tokens="last", erase=2.0, preserve=0.3, ridge=0.7), model=model)
    assert all(torch.allclose(model.named()[name], (w.double() @ m).float(), rtol=0, atol=1e-7) for name, w in before.items())


def test_the_weights_change_by_no_more_rank_than_erased_vectors() -> None:
    """`last`, one erased name: one vector moves, so every W - W_old has rank 1 (up to float32 rounding)."""
    before = small.weights(small.pipe(), KV)
    model, _ = small.after(Method(tokens="last"), asking("x"))
    for name, old in before.items():
        values = torch.linalg.svdvals((model.named()[name] - old).double())
        assert values[0] > 1e-4
        assert values[1] < 1e-3 * values[0]


def test_only_keys_and_values_move_and_no_pass_is_made() -> None:
    """Zero UNet passes; everything but the cross-attention's keys and values stays bit for bit."""
    before = small.weights(small.pipe())
    model, run = small.after(Method())
    assert model.passes == 0
    assert run.losses == []
    assert small.moved(before, small.weights(model)) == {name for name in before if KV(name)}
    assert Method().images(tiny.task()) == {}


def test_preserved_names_keep_their_keys_and_values_better() -> None:
    """Signature: without the preserve term the weights differ, and the retained name "k" is mapped farther from where it was."""
    before, shifts, results = small.weights(small.pipe(), KV), [], []
    for preserve in (0.0, 100.0):
        model, _ = small.after(Method(preserve=preserve, tokens="last"))
        k = model.encode(["k"])[0, 1]
        shifts.append(sum(((model.named()[name] - old) @ k).norm().item() for name, old in before.items()))
        results.append(small.weights(model, KV))
    assert small.moved(*results) == set(before)
    assert shifts[1] < 0.1 * shifts[0]


def test_the_erased_name_is_mapped_to_its_guide() -> None:
    """With a heavy erase term the keys and values of "x" become those that "p" had, and those of "p" before are what is meant."""
    model = small.pipe()
    before = small.weights(model, KV)
    x, p = (model.encode([name])[0, 1] for name in ("x", "p"))
    small.after(Method(erase=1e4, tokens="last"), asking("x"), model)
    for name, old in before.items():
        assert (model.named()[name] @ x - old @ p).norm() < 0.01 * (old @ x - old @ p).norm()


# --- which vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "position"), [("", 0), ("x", 1), ("xyz", 3), ("the x", 4)])
def test_the_last_word_piece(prompt: str, position: int) -> None:
    """One token a letter after the start token: "the x" is start t h e x end, its last piece at 4; "" has none and gives the start token, 0."""
    assert last_word(small.pipe(), prompt) == position


@pytest.mark.parametrize(
    ("concept", "guide", "first", "guides_first", "length"), [("x", "p", 1, 1, 15), ("xyz", "p", 3, 1, 13), ("x", "pqrst", 1, 5, 11), ("x", "", 1, 0, 15)]
)
def test_tails_are_aligned_at_the_last_word_pieces(concept: str, guide: str, first: int, guides_first: int, length: int) -> None:
    """Of 16 positions, a name of n letters has its last piece at n and a tail of 16 - n; the shorter of both tails is kept; "" starts at 0."""
    model = small.pipe()
    e, e_star = model.encode([concept, guide]).double()
    moved, wanted = Method(tokens="tail")._aligned(model, concept, guide)
    assert len(moved) == len(wanted) == length
    assert torch.equal(moved, e[first : first + length])
    assert torch.equal(wanted, e_star[guides_first : guides_first + length])


@pytest.mark.parametrize(("concept", "guide", "first", "guides_first"), [("x", "p", 1, 1), ("xyz", "p", 3, 1), ("x", "", 1, 0)])
def test_last_pairs_one_vector(concept: str, guide: str, first: int, guides_first: int) -> None:
    """The last word piece of the concept with that of the guide; with "" that is the start token."""
    model = small.pipe()
    e, e_star = model.encode([concept, guide]).double()
    moved, wanted = Method(tokens="last")._aligned(model, concept, guide)
    assert torch.equal(moved, e[first : first + 1])
    assert torch.equal(wanted, e_star[guides_first : guides_first + 1])


def test_the_empty_prompt_is_preserved_with_tails_only() -> None:
    """`tail` keeps all 16 positions of "" and of each name, 3 x 16; `last` keeps one vector a name, 2."""
    model = small.pipe()
    tail = Method(tokens="tail").kept(model, ("k", "l"))
    last = Method(tokens="last").kept(model, ("k", "l"))
    assert torch.equal(tail, model.encode(["", "k", "l"]).double().flatten(0, 1))
    assert torch.equal(last, model.encode(["k", "l"])[:, 1].double())


def test_with_task_prompts_concept_and_guide_share_the_template() -> None:
    """Two templates and two names make four pairs, each the same sentence about the concept and about the guide."""
    task = tiny.task()
    assert Method(prompts="task").pairs(small.pipe(), task) == [("a x", "a p"), ("the x", "the p"), ("a y", "a p"), ("the y", "the p")]
    assert Method().pairs(small.pipe(), task) == [("x", "p"), ("y", "p")]


@pytest.mark.parametrize("tokens", ["tail", "last"])
def test_erasing_in_another_order_gives_the_same_model(tokens: str) -> None:
    """The names of a task are a set: x then y is y then x, k then l is l then k, up to rounding in float64."""
    one, _ = small.after(Method(tokens=tokens), asking("x", "y", retain=("k", "l")))
    other, _ = small.after(Method(tokens=tokens), asking("y", "x", retain=("l", "k")))
    assert all(torch.allclose(p, other.named()[name], rtol=0, atol=1e-7) for name, p in one.named().items())


@pytest.mark.parametrize("prompts", ["name", "task"])
@pytest.mark.parametrize("guide", ["y", "Y", " y"])
def test_a_guide_that_is_the_concept_is_refused(guide: str, prompts: Literal["name", "task"]) -> None:
    """A name that becomes itself erases nothing, nor does what the tokenizer reads as that name; an error and no silent no-op, and the weights stay."""
    model, before = small.pipe(), small.weights(small.pipe())
    assert torch.equal(model.tokens("y"), model.tokens(guide))
    with pytest.raises(SpecError, match="choose another `guide`"):
        small.after(Method(guide=guide, prompts=prompts), model=model)
    assert small.same(before, small.weights(model))


def test_the_guide_is_the_tasks_anchor_unless_given() -> None:
    """No guide is the anchor "p"; another guide, also the empty one, gives another model."""
    default, given_, other, empty = (small.weights(small.after(Method(guide=guide))[0], KV) for guide in (None, "p", "q", ""))
    assert small.same(default, given_)
    assert small.moved(default, other) == small.moved(default, empty) == small.moved(other, empty) == set(default)


def test_multiplying_by_the_identity_changes_no_bit() -> None:
    """W I = W exactly, so an empty edit is an exact no-op on the weights."""
    model, before = small.pipe(), small.weights(small.pipe())
    multiply(model.parameters("unet.xattn_kv").values(), torch.eye(16, dtype=torch.float64))
    assert small.same(before, small.weights(model))


# --- requests that cannot be meant ------------------------------------------------------------------------------------


@pytest.mark.parametrize("concept", ["", " ", "12"])
def test_a_concept_of_no_letters_is_refused(concept: str) -> None:
    """What the tokenizer reads as an empty prompt erases the start token for everybody; the error names the task's `erased`."""
    with pytest.raises(SpecError, match="`erased`"):
        small.after(Method(), asking("x", concept))


@pytest.mark.parametrize(("task", "guide"), [(asking("x" * 15), None), (asking("x", anchor="p" * 15), None), (asking("x"), "q" * 15)])
def test_a_name_past_the_context_is_refused(task: object, guide: str | None) -> None:
    """15 letters with start and end take 17 of 16 positions: an error with the name and the limit, not a cut."""
    model, before = small.pipe(), small.weights(small.pipe())
    with pytest.raises(SpecError, match=r"`erased` or `guide`: .*17 tokens .* reads 16; shorten it"):
        small.after(Method(guide=guide), task, model)
    assert small.same(before, small.weights(model))


def test_embeddings_that_are_not_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the text embeddings stops before any weight is touched."""
    model, before = small.pipe(), small.weights(small.pipe())
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda texts: encode(texts) * float("nan"))
    with pytest.raises(PreconditionError, match="not finite"):
        small.after(Method(), model=model)
    assert small.same(before, small.weights(model))


def test_a_model_without_cross_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that matches nothing: the error names it and what there is."""
    model = small.pipe()
    named = {name: p for name, p in model.named().items() if not KV(name)}
    monkeypatch.setattr(model, "named", lambda: named)
    with pytest.raises(SpecError, match=r"'unet.xattn_kv' matches nothing .* allowed"):
        Method()(model, tiny.task(), small.run(model, Method(), tiny.task()))
