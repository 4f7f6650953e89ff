"""MACE's closed forms: which tokens are paired, one matrix for the refinement, one weight for many LoRAs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.errors import PreconditionError, SpecError
from harness.unlearning import _mace_closed
from harness.unlearning._mace_closed import Fusion, coexisting, gram, inverse, refinement, span
from tests.unlearning import _small as small

CALM = settings(deadline=None, max_examples=50)  # a busy machine is no failure
SEEDS, WEIGHTS, COUNTS = st.integers(0, 10_000), st.floats(0.05, 5), st.integers(1, 4)
DIM, OUT = 6, 4
EYE = torch.eye(DIM, dtype=torch.float64)
ZERO = torch.zeros_like(EYE)


def vectors(seed: int, *counts: int, d: int = DIM) -> list[Tensor]:
    """Random float64 matrices (count, d)."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(count, d, generator=rng, dtype=torch.float64) for count in counts]


def close(a: Tensor, b: Tensor, atol: float = 1e-9) -> bool:
    """Equal in float64 up to the condition of the system."""
    return bool(torch.allclose(a, b, rtol=0, atol=atol))


def stacked(rows: list[tuple[float, Tensor, Tensor]]) -> Tensor:
    """W that minimises sum weight ||W left - right||^2 over rows (weight, left (n, d), right (n, out)), by numpy; the smallest W of many."""
    left = np.concatenate([np.sqrt(weight) * x.numpy() for weight, x, _ in rows])
    right = np.concatenate([np.sqrt(weight) * y.numpy() for weight, _, y in rows])
    return torch.from_numpy(np.linalg.lstsq(left, right, rcond=1e-11)[0].T)


# --- the refinement ---------------------------------------------------------------------------------------------------


@CALM
@given(seed=SEEDS, n=COUNTS, k=COUNTS, lam1=WEIGHTS, ridge=WEIGHTS)
def test_the_refinement_is_the_stacked_least_squares(seed: int, n: int, k: int, lam1: float, ridge: float) -> None:
    """W M minimises ||W' E_f - W E_g||^2 + lam1 ||W' P - W P||^2 + ridge ||W' - W||^2, for two matrices of other heights with the same M."""
    e_f, e_g, p, tall, low = vectors(seed, n, n, k, OUT, 2)
    m = refinement([(e_f, e_g)], p.T @ p, lam1, ridge)
    for w in (tall, low):
        assert close(w @ m, stacked([(1, e_f, e_g @ w.T), (lam1, p, p @ w.T), (ridge, EYE, w.T)]))


@CALM
@given(seed=SEEDS, n=COUNTS)
def test_without_prior_the_change_is_the_smallest_that_does_it(seed: int, n: int) -> None:
    """lam1 = ridge = 0 and n < d: every token gets exactly its target, and W' - W is numpy's minimum-norm solution."""
    e_f, e_g, w = vectors(seed, n, n, OUT)
    m = refinement([(e_f, e_g)], ZERO, 0.0, 0.0)
    assert close(w @ m @ e_f.T, w @ e_g.T, atol=1e-7)
    assert close(w @ m - w, stacked([(1, e_f, (e_g - e_f) @ w.T)]), atol=1e-7)


def test_one_vector_moves_as_far_as_a_hand_computes() -> None:
    """e_f = e1, e_g = e2, prior e1 e1^T with lam1 = 1, ridge 0: W' e1 balances W e2 and W e1 in halves; e2, in no sum, stays."""
    e1, e2 = torch.eye(2, dtype=torch.float64)[:, None]
    m = refinement([(e1, e2)], e1.T @ e1, 1.0, 0.0)
    assert close(m, torch.tensor([[0.5, 0.0], [0.5, 1.0]], dtype=torch.float64))


@CALM
@given(seed=SEEDS, n=COUNTS, lam1=st.sampled_from([0.0, 1e-4, 3.0]), ridge=st.sampled_from([0.0, 1e-4, 3.0]))
def test_a_mapping_that_changes_no_token_changes_nothing(seed: int, n: int, lam1: float, ridge: float) -> None:
    """E_g = E_f, or no pair at all: M is the identity, bit for bit."""
    e_f, p = vectors(seed, n, 3)
    assert torch.equal(refinement([(e_f, e_f)], p.T @ p, lam1, ridge), EYE)
    assert torch.equal(refinement([], p.T @ p, lam1, ridge), EYE)


@CALM
@given(seed=SEEDS)
def test_lambda_1_holds_the_prior_in_place(seed: int) -> None:
    """The error of the prior's tokens falls with lam1, over the paper's grid and beyond."""
    e_f, e_g, p = vectors(seed, 5, 5, 4)
    errors = [((refinement([(e_f, e_g)], p.T @ p, lam1, 1e-6) - EYE) @ p.T).norm().item() for lam1 in (0, 1e-4, 1e-3, 1e-2, 1e-1, 1, 1e4)]
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(errors))
    assert errors[-1] < 0.01 * errors[0]


@CALM
@given(seed=SEEDS, order=st.permutations(range(4)))
def test_the_order_of_pairs_does_not_matter(seed: int, order: list[int]) -> None:
    """Sums do not know their order."""
    pairs = [tuple(vectors(seed + i, 3, 3)) for i in range(4)]
    one, other = (refinement(each, EYE, 0.1, 0.1) for each in (pairs, [pairs[i] for i in order]))
    assert close(one, other)


def test_numbers_that_are_none_are_refused() -> None:
    """NaN in a system: an error that says where to look, not LAPACK's."""
    with pytest.raises(PreconditionError, match="not finite"):
        inverse(EYE * float("nan"))


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "name", "place"), [("a {}", "x", (2, 3, 3)), ("{}", "xyz", (1, 4, 4)), ("the {} in a q", "xy", (4, 6, 10)), ("{} a", "x y", (1, 3, 4))]
)
def test_where_a_name_stands(template: str, name: str, place: tuple[int, int, int]) -> None:
    """One token a letter after the start token: first position, the one behind, the end token's."""
    assert span(small.pipe(), template, name) == place


def test_a_name_that_melts_into_its_prompt_is_refused() -> None:
    """In "{}b" the last letter of the name is no end of a word any more."""
    with pytest.raises(SpecError, match="put spaces around"):
        span(small.pipe(), "a {}b", "x")


@pytest.mark.parametrize("mapping", ["p", "pq", "pqrst", "x p", "someone"])
@pytest.mark.parametrize(("template", "name"), [("a {}", "x"), ("the {} in a q", "xyz"), ("{}", "x y")])
def test_each_pair_is_the_same_token_in_both_prompts(template: str, name: str, mapping: str) -> None:
    """16 - (the longer of both places behind the names) + those before; the start token is first and unmoved; no token of either name is in;
    what is paired has the same id.
    """
    model = small.pipe()
    e_f, e_g = coexisting(model, template, name, mapping)
    places = []
    for each, e in ((name, e_f), (mapping, e_g)):
        prompt = template.replace("{}", each)
        rows = model.encode([prompt])[0].double()
        at = [next(i for i, row in enumerate(rows) if torch.equal(row, vector)) for vector in e]
        assert at == sorted(set(at))
        first, behind, _ = span(model, template, each)
        assert not set(at) & set(range(first, behind))
        places.append((model.tokens(prompt)[0][at], behind, first))
    (ids, f, first), (others, g, _) = places
    assert torch.equal(ids, others)
    assert len(ids) == first + 16 - max(f, g)
    assert torch.equal(e_f[0], e_g[0])


def test_a_gram_is_the_sum_of_outer_products_in_whatever_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five prompts of 16 positions: sum e e^T by hand, and the same in chunks of two."""
    model, prompts = small.pipe(), ["", "x", "a k", "the p", "q"]
    by_hand = sum(torch.outer(e, e) for e in model.encode(prompts).double().flatten(0, 1))
    assert close(gram(model, prompts), torch.as_tensor(by_hand))
    monkeypatch.setattr(_mace_closed, "CHUNK", 2)
    assert close(gram(model, prompts), torch.as_tensor(by_hand))


# --- the fusion -------------------------------------------------------------------------------------------------------


def case(seed: int, concepts: int, per_concept: int = 3, rank: int = 1) -> dict[str, Any]:
    """W, W', a prior, and each concept's tokens and LoRA."""
    w, refined, prior, *rest = vectors(seed, OUT, OUT, 2, *[per_concept, rank, rank] * concepts)
    loras = [(e, vectors(seed + 7 + i, rank, d=OUT)[0].T, down) for i, (e, down) in enumerate(zip(rest[::3], rest[1::3], strict=True))]
    return {"w": w, "refined": refined, "prior": prior, "loras": loras}


def fused(each: dict[str, Any], lam2: float, ridge: float, order: list[int] | None = None) -> Tensor:
    """W* of a case."""
    ranks = sum(len(down) for _, _, down in each["loras"])
    fusion = Fusion(each["prior"].T @ each["prior"], lam2, ridge, {"w": (OUT, DIM)}, ranks)
    for i in order or range(len(each["loras"])):
        e, up, down = each["loras"][i]
        fusion.add(e.T @ e, {"w": (up, down)})
    return dict(fusion.weights({"w": each["refined"]}, {"w": each["w"]}))["w"]


def quadratic(each: dict[str, Any], lam2: float, ridge: float, w: Tensor) -> float:
    """What the fusion minimises."""
    terms = [((w - each["refined"] - up @ down) @ e.T).square().sum() for e, up, down in each["loras"]]
    return float(sum(terms) + lam2 * ((w - each["w"]) @ each["prior"].T).square().sum() + ridge * (w - each["refined"]).square().sum())


@CALM
@given(seed=SEEDS, concepts=COUNTS, rank=st.integers(1, 2), lam2=WEIGHTS, ridge=WEIGHTS)
def test_the_fusion_is_the_stacked_least_squares(seed: int, concepts: int, rank: int, lam2: float, ridge: float) -> None:
    """Rows: each concept's tokens with its LoRA's outputs, the prior with W's, the ridge with W'."""
    each = case(seed, concepts, rank=rank)
    rows = [(1.0, e, e @ (each["refined"] + up @ down).T) for e, up, down in each["loras"]]
    rows += [(lam2, each["prior"], each["prior"] @ each["w"].T), (ridge, EYE, each["refined"].T)]
    assert close(fused(each, lam2, ridge), stacked(rows), atol=1e-8)


@CALM
@given(seed=SEEDS, size=st.floats(1e-3, 10))
def test_no_perturbation_of_the_fusion_is_better(seed: int, size: float) -> None:
    """It is the minimum of its own quadratic."""
    each = case(seed, 3)
    best, noise = fused(each, 0.3, 0.1), vectors(seed + 1, OUT)[0]
    assert quadratic(each, 0.3, 0.1, best) < quadratic(each, 0.3, 0.1, best + size * noise)


@CALM
@given(seed=SEEDS, tokens=st.integers(1, 8))
def test_one_lora_alone_keeps_its_outputs(seed: int, tokens: int) -> None:
    """One concept, no prior, no ridge: on its own tokens W* gives what W' + up down gives; it is W' + up down if they span the space."""
    each = case(seed, 1, per_concept=tokens)
    (e, up, down), result = each["loras"][0], fused(each, 0.0, 0.0)
    wanted = each["refined"] + up @ down
    assert close(result @ e.T, wanted @ e.T, atol=1e-7)
    assert tokens < 2 * DIM or close(result, wanted, atol=1e-6)


@CALM
@given(seed=SEEDS, lam2=st.sampled_from([0.0, 1e-4, 3.0]), ridge=st.sampled_from([0.0, 1e-4, 3.0]))
def test_loras_that_learned_nothing_and_no_refinement_leave_the_weights(seed: int, lam2: float, ridge: float) -> None:
    """up = 0 and W' = W: W* is W, bit for bit; so it is with no concept."""
    each = case(seed, 2)
    each = {**each, "refined": each["w"], "loras": [(e, torch.zeros_like(up), down) for e, up, down in each["loras"]]}
    assert torch.equal(fused(each, lam2, ridge), each["w"])
    assert torch.equal(fused({**each, "loras": []}, lam2, ridge), each["w"])


@CALM
@given(seed=SEEDS, concepts=COUNTS)
def test_concepts_with_the_same_tokens_share_the_mean_of_their_loras(seed: int, concepts: int) -> None:
    """Equal Grams of full rank: W* = W' + mean up_i down_i."""
    each = case(seed, concepts, per_concept=8)
    each["loras"] = [(each["loras"][0][0], up, down) for _, up, down in each["loras"]]
    mean = sum(up @ down for _, up, down in each["loras"]) / concepts
    assert close(fused(each, 0.0, 0.0), each["refined"] + mean, atol=1e-6)


@CALM
@given(seed=SEEDS, order=st.permutations(range(3)))
def test_the_order_of_concepts_does_not_matter(seed: int, order: list[int]) -> None:
    """Neither does which concept comes first."""
    each = case(seed, 3)
    assert close(fused(each, 0.3, 0.1), fused(each, 0.3, 0.1, order))


@CALM
@given(seed=SEEDS)
def test_the_prior_pulls_to_the_original_and_the_ridge_to_the_refined_weights(seed: int) -> None:
    """W in place of W* makes the lam2 term 0, so lam2 ||(W* - W) P||^2 is at most the other terms there; likewise ridge and W'."""
    each = case(seed, 2)
    for weight in (1.0, 1e3, 1e6):
        at_prior = ((fused(each, weight, 0.1) - each["w"]) @ each["prior"].T).square().sum().item()
        assert weight * at_prior <= quadratic(each, 0.0, 0.1, each["w"]) * (1 + 1e-6)
        from_refined = (fused(each, 0.3, weight) - each["refined"]).square().sum().item()
        assert weight * from_refined <= quadratic(each, 0.3, 0.0, each["refined"]) * (1 + 1e-6)


def test_a_concept_leaves_its_factors_and_no_gram_behind() -> None:
    """With 1, 10 and 100 concepts the fusion grows by rank x (d + d_out) numbers each, not by d x d, and not by the number of tokens."""
    sizes = []
    for concepts in (1, 10, 100):
        fusion = Fusion(EYE, 0.1, 0.0, {"w": (OUT, DIM)}, concepts)
        for i in range(concepts):
            (e,) = vectors(i, 50)
            fusion.add(e.T @ e, {"w": (torch.ones(OUT, 1), torch.ones(1, DIM))})
        kept = [fusion.system, fusion.pull, *fusion.up.values(), *fusion.down.values()]
        assert set(vars(fusion)) == {"system", "pull", "up", "down", "used"}
        sizes.append(sum(each.numel() for each in kept))
    assert sizes == [2 * DIM * DIM + n * (DIM + OUT) for n in (1, 10, 100)]
