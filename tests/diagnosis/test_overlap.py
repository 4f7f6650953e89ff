"""The diagnostic: exact where the theory is, and blind to what must not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.data import Captioned
from harness.diagnosis import overlap as diagnosis
from harness.errors import SpecError
from tests.unlearning import _small as small

CALM = settings(deadline=None, max_examples=30)
SEEDS = st.integers(0, 999)


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Random float64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(count: int) -> diagnosis.Gradients:
    """As many gradients of five numbers."""
    return diagnosis.Gradients(rows(count, 5), rows(5), rows(count, 2))


def diagnosed(model: Any, forget: Captioned, finetune: Captioned, retain: Captioned | None = None, **how: Any) -> diagnosis.Overlap:
    """The group x, from four gradients of two images each."""
    sets = [diagnosis.gradients(model, data, "x", 4, 2, 256) for data in (forget, finetune, retain or finetune)]
    return diagnosis.diagnose(model, *sets, "x", **how)


# --- the linear case --------------------------------------------------------------------------------------------------


@CALM
@given(seed=SEEDS, steps=st.integers(1, 60))
def test_the_prediction_is_exact_for_a_linear_denoiser(seed: int, steps: int) -> None:
    """eps_w(x) = w . x with a diagonal quadratic loss on the fine-tuning set: k steps of gradient descent change a linear forget loss by -RS x gap."""
    curvature, start, g_f, lr = rows(6, seed=seed).abs(), rows(6, seed=seed + 1), rows(6, seed=seed + 2), 0.1
    w = start.clone()
    for _ in range(steps):
        w = w - lr * curvature * w  # the fine-tuning loss is sum_j F_j w_j^2 / 2
    fell = -(g_f @ (w - start)).item()
    assert diagnosis.resurgence(g_f, curvature * start, curvature, lr, steps, gap=2.0) == pytest.approx(fell / 2, abs=1e-10)


@CALM
@given(seed=SEEDS, steps=st.integers(1, 60))
def test_the_erasure_contracts_as_the_linear_theory_says(seed: int, steps: int) -> None:
    """Delta (I - lr Sigma)^k is what k steps leave of an erasure Delta; f_k(l) l = 1 - (1 - lr l)^k is the share that is gone."""
    sigma, lr = rows(5, seed=seed).abs(), 0.1
    assert torch.allclose(diagnosis.reach(sigma, lr, steps) * sigma, 1 - (1 - lr * sigma) ** steps, atol=1e-12)


@CALM
@given(seed=SEEDS, tau=st.floats(1e-3, 1.0))
def test_the_orthogonal_term_is_exact_for_a_linear_denoiser(seed: int, tau: float) -> None:
    """Quadratic losses with gradients Sigma (w - w*): what a step tau along -g_f / |g_f| does to the retained's loss, less its second order
    tau^2 / 2 u^T Sigma_r u, is -tau |g_r| times the term, to 1e-10; of one pair its interval is the term itself.
    """
    w, sigma_f, sigma_r = rows(6, seed=seed), *(a.T @ a for a in (rows(6, 6, seed=seed + 1), rows(6, 6, seed=seed + 2)))
    ends = rows(2, 6, seed=seed + 3)
    g_f, g_r = sigma_f @ (w - ends[0]), sigma_r @ (w - ends[1])

    def retained(at: Tensor) -> Tensor:
        return (at - ends[1]) @ sigma_r @ (at - ends[1]) / 2

    u = g_f / g_f.norm()
    first = retained(w - tau * u) - retained(w) - tau**2 / 2 * u @ sigma_r @ u
    term, low, high = diagnosis.orthogonal(g_f[None], g_r[None])
    assert first.item() == pytest.approx(-tau * g_r.norm().item() * term, abs=1e-10 * float(sigma_r.norm()))
    assert low == high == pytest.approx(term)


def test_the_orthogonal_term_is_of_pairs() -> None:
    """Each pair counts once, however long its gradients; a gradient of zero counts as 0. By hand: (1 - 1 + 0 + 0) / 4; the mean rows would give -.8."""
    f = torch.tensor([[1.0, 0], [9, 0], [0, 1], [0, 0]])
    r = torch.tensor([[5.0, 0], [-1, 0], [1, 0], [1, 1]])
    term, low, high = diagnosis.orthogonal(f, r)
    assert term == 0
    assert low < 0 < high
    assert diagnosis.orthogonal(f[:1], r[:1])[0] == pytest.approx(1)
    assert diagnosis.orthogonal(f[1:2], r[1:2])[0] == pytest.approx(-1)


def test_the_interval_of_the_orthogonal_term_covers_the_truth() -> None:
    """Pairs in two dimensions at a mean cosine of .5, each turned by up to 30 degrees: of 100 intervals, about 95 hold .5 sin(30) / (pi / 6)."""
    truth, hits = 0.5 * 0.5 / (torch.pi / 6), 0
    for i in range(100):
        angle = torch.pi / 3 + (torch.rand(64, generator=torch.Generator().manual_seed(i)).double() - 0.5) * torch.pi / 3
        f, r = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([[1.0, 0]], dtype=torch.float64).expand(64, 2)
        _, low, high = diagnosis.orthogonal(f, r)
        hits += low <= truth <= high
    assert 85 <= hits <= 100
    assert high - low == pytest.approx(2 * 1.96 * angle.cos().std().item() / 8, rel=0.2)  # of the mean of 64, not of one pair


def test_the_first_cross_attention_layer_is_one() -> None:
    """All weights of the first attn2, none of the second, of self-attention or of another layer whose name begins alike; none at all without."""
    names = ["unet.conv_in.weight", *(f"unet.down.0.{a}.{w}.weight" for a in ("attn1", "attn2") for w in ("to_q", "to_k")), "unet.down.01.attn2.to_q.weight"]
    assert diagnosis.first_layer(names) == names[3:5]
    assert diagnosis.first_layer(names[:3]) == []


def test_no_overlap_no_resurgence() -> None:
    """Fine-tuning that moves only directions the concept's loss does not feel closes nothing of the gap."""
    g_f, g_t = torch.tensor([1.0, 2, 0, 0]), torch.tensor([0.0, 0, 3, 4])
    assert diagnosis.resurgence(g_f, g_t, torch.ones(4), 0.1, 50, 1.0) == 0


def test_the_limits_of_the_reach() -> None:
    """Flat directions go lr k far, stiff ones stop at 1 / l."""
    curvature = torch.tensor([0.0, 1e-8, 2.0], dtype=torch.float64)
    found = diagnosis.reach(curvature, 0.1, 1000)
    assert found.tolist() == pytest.approx([100, 100, 0.5], rel=1e-4)


# --- subspaces --------------------------------------------------------------------------------------------------------


@CALM
@given(seed=SEEDS, scale=st.floats(0.01, 100))
def test_the_overlap_knows_spans_only(seed: int, scale: float) -> None:
    """1 for one span, 0 for orthogonal ones; rotating the gradients within their span or scaling them changes nothing."""
    one, two = rows(3, 10, seed=seed), rows(4, 10, seed=seed + 1)
    mixed = scale * torch.linalg.qr(rows(3, 3, seed=seed + 2)).Q @ one
    value, chance = diagnosis.overlap(diagnosis.subspace(one, 1.0), diagnosis.subspace(two, 1.0))
    again, _ = diagnosis.overlap(diagnosis.subspace(mixed, 1.0), diagnosis.subspace(two, 1.0))
    assert value == pytest.approx(again, abs=1e-9)
    assert 0 <= value <= 1 + 1e-9
    assert chance == 4 / 10
    assert diagnosis.overlap(diagnosis.subspace(one, 1.0), diagnosis.subspace(mixed, 1.0))[0] == pytest.approx(1)
    flat = torch.eye(10, dtype=torch.float64)
    assert diagnosis.overlap(diagnosis.subspace(flat[:3], 1.0), diagnosis.subspace(flat[3:7], 1.0))[0] == pytest.approx(0, abs=1e-12)


def test_random_subspaces_overlap_by_chance() -> None:
    """The mean over 30 pairs of 5 and 10 directions in 100 is 10 / 100 within .02."""
    values = [diagnosis.overlap(diagnosis.subspace(rows(5, 100, seed=i), 1.0), diagnosis.subspace(rows(10, 100, seed=1000 + i), 1.0)) for i in range(30)]
    assert sum(v for v, _ in values) / 30 == pytest.approx(values[0][1], abs=0.02)


def test_the_subspace_holds_the_energy_and_no_more() -> None:
    """Singular values 10, 1, 0.1: 95 % is in the first, 99.9 % in two."""
    x = torch.diag(torch.tensor([10.0, 1, 0.1], dtype=torch.float64))
    assert [diagnosis.subspace(x, e).shape[1] for e in (0.95, 0.999, 1.0)] == [1, 2, 3]


def test_a_sketch_keeps_the_overlap() -> None:
    """Two spans that share 3 of 6 directions in 20000 dimensions: .5 before, .5 within .06 after a sketch to 4096."""
    one, two = rows(6, 20000), torch.cat([rows(6, 20000)[:3], rows(3, 20000, seed=1)])
    before, _ = diagnosis.overlap(diagnosis.subspace(one, 1.0), diagnosis.subspace(two, 1.0))
    hashed = diagnosis.hashes(20000, 4096)
    sketched = [torch.stack([diagnosis.sketch(row, 4096, hashed) for row in each]) for each in (one, two)]
    after, _ = diagnosis.overlap(*(diagnosis.subspace(each, 1.0) for each in sketched))
    assert before == pytest.approx(0.5, abs=0.02)
    assert after == pytest.approx(before, abs=0.06)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: diagnosis.resurgence(torch.ones(2), torch.ones(2), torch.ones(2), 0.1, 1, 0.0), "no gap to close"),
        (lambda: diagnosis.overlap(torch.eye(3), torch.eye(4)), "two subspaces of one space"),
        (lambda: diagnosis.diagnose(None, *[made(2)] * 3, gap=1.0, lr=0.1, grid=()), "steps to predict"),  # type: ignore[arg-type]
        (lambda: diagnosis.diagnose(None, *[made(1)] * 3, gap=1.0, lr=0.1), "at least 2"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_diagnosed_is_refused(wrong: object, message: str) -> None:
    """No gap, two spaces, no steps, one gradient."""
    with pytest.raises(SpecError, match=message):
        wrong()  # type: ignore[operator]


# --- how sure, and where ----------------------------------------------------------------------------------------------


def test_the_interval_of_the_alignment_covers_the_truth() -> None:
    """Gradients with noise around two means at 60 degrees: of 100 intervals, about 95 hold the cosine .5; and they narrow with the count."""
    one, two = torch.zeros(2, 20, dtype=torch.float64)
    one[0], two[0], two[1] = 4.0, 2.0, 12**0.5
    found = [diagnosis.bootstrap(one + rows(64, 20, seed=2 * i), two + rows(64, 20, seed=2 * i + 1)) for i in range(100)]
    assert 85 <= sum(low <= 0.5 <= high for low, high in found) <= 100
    few = diagnosis.bootstrap(one + rows(8, 20), two + rows(8, 20, seed=1))
    assert few[1] - few[0] > 1.5 * (found[0][1] - found[0][0])


def test_what_carried_it_sums_to_one() -> None:
    """Each parameter's product goes to its block and kind; a part that points away counts below 0."""
    names = ["unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", "unet.mid_block.resnets.0.conv1.weight", "unet.conv_in.weight"]
    found = diagnosis.carried(names, [2, 1, 1], torch.tensor([1.0, 2, -1, 3]), torch.tensor([1.0, 2, 2, 1]))
    assert {name: share for name, share in found.items() if share} == pytest.approx({"up cross-attention": 5 / 6, "mid other": -2 / 6, "other other": 3 / 6})
    assert list(found) == list(diagnosis.PARTS)
    assert set(diagnosis.carried(names, [2, 1, 1], torch.zeros(4), torch.ones(4)).values()) == {0.0}


# --- on a model -------------------------------------------------------------------------------------------------------


def test_a_set_is_aligned_with_itself() -> None:
    """Same data twice: alignment and overlap 1, a positive prediction that grows with the steps; the weights stay."""
    model = small.pipe()
    before = small.weights(model)
    data = Captioned(model, small.pictures(4), ["a x"] * 4)
    found = diagnosed(model, data, data, gap=1.0, lr=1e-3, grid=(1, 10))
    assert (found.alignment, found.overlap) == pytest.approx((1, 1), abs=1e-5)
    assert 0 < found.predicted[1] < found.predicted[10]
    assert found.chance <= 4 / 256
    assert found.low <= found.high <= 1 + 1e-6
    assert sum(found.carried.values()) == pytest.approx(1, abs=1e-5)
    assert {name.split()[1] for name, share in found.carried.items() if share} == {"cross-attention"}  # of the group x
    assert small.same(small.weights(model), before)


def test_the_orthogonal_term_is_told_of_the_first_layer() -> None:
    """The concept's gradients against the retained's, not against fine-tuning's; 1 where both are the same; in full, not of the sketch."""
    model = small.pipe()
    forget, retain = (Captioned(model, small.pictures(4, seed), ["a x"] * 4) for seed in (0, 5))
    term, low, high = diagnosed(model, forget, forget, retain, gap=1.0, lr=1e-3).orthogonal or (0.0, 0.0, 0.0)
    assert -1 <= low <= term <= high < 0.9999
    assert diagnosed(model, forget, retain, forget, gap=1.0, lr=1e-3).orthogonal == pytest.approx((1, 1, 1), abs=1e-5)
    f, r = (diagnosis.gradients(model, data, "x", 4, 2, 256) for data in (forget, retain))
    layer = diagnosis.first_layer(list(model.parameters("x")))
    assert f.first.shape == (4, sum(model.parameters("x")[name].numel() for name in layer))
    assert term == pytest.approx(diagnosis.orthogonal(f.first, r.first)[0])
    start = list(model.parameters("x")).index(layer[0])
    before = sum(p.numel() for p in list(model.parameters("x").values())[:start])
    assert torch.allclose(f.first.mean(0), f.mean[before : before + f.first.shape[1]], atol=1e-7)
    bare = diagnosis.Gradients(f.rows, f.mean, torch.empty(4, 0))
    assert diagnosis.diagnose(model, bare, f, r, "x", gap=1.0, lr=1e-3).orthogonal is None


def test_the_first_step_is_the_inner_product_of_the_mean_gradients() -> None:
    """Signature: RS(1) = lr <g_f, g_t> / gap, and another fine-tuning set gives another."""
    model = small.pipe()
    forget, other = (Captioned(model, small.pictures(4, seed), ["a x"] * 4) for seed in (0, 5))
    means = [diagnosis.gradients(model, data, "x", 4, 2, 256)[1] for data in (forget, other)]
    found = diagnosed(model, forget, other, gap=0.5, lr=1e-3, grid=(1,))
    assert found.predicted[1] == pytest.approx(1e-3 * float(means[0] @ means[1]) / 0.5, rel=1e-4)
    assert found.alignment < 0.9999
