"""UnlearnDiffAtk: the projection, the straight-through token, and an attack that only ever asks the unlearned model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.detection._rule import Rule
from harness.engine import Engine
from harness.errors import PreconditionError, SpecError
from harness.pipeline import Pipe, StableDiffusion
from harness.relearning import unlearndiffatk
from harness.relearning.unlearndiffatk import Attack, simplex
from harness.sampling import draw
from harness.spec import Base, ImageSet, Lineage, Sampler
from harness.store import Store
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None)
QUICK = Attack(tokens=2, timesteps=2, iterations=3, lr=0.1)
SAMPLER = Sampler(2, 3.0)
ROWS = st.lists(st.lists(st.floats(-50, 50), min_size=4, max_size=4), min_size=1, max_size=3)


def by_sorting(row: Tensor) -> Tensor:
    """The projection of Duchi et al. (2008), which sorts."""
    ordered = row.sort(descending=True).values
    sums = ordered.cumsum(0) - 1
    rho = int((ordered - sums / torch.arange(1, len(row) + 1) > 0).nonzero().max())
    return (row - sums[rho] / (rho + 1)).clamp(min=0)


@CALM
@given(rows=ROWS)
def test_the_projection_is_the_sorted_one(rows: list[list[float]]) -> None:
    """Entries in [0, 1] that sum to 1, equal to Duchi's algorithm, and projecting twice changes nothing."""
    x = torch.tensor(rows, dtype=torch.float64)
    found = simplex(x)
    assert torch.allclose(found.sum(1), torch.ones(len(x), dtype=torch.float64), atol=1e-9)
    assert ((found >= 0) & (found <= 1 + 1e-12)).all()
    assert torch.allclose(found, torch.stack([by_sorting(row) for row in x]), atol=1e-9)
    assert torch.allclose(simplex(found), found, atol=1e-9)


@CALM
@given(gradient=st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_a_token_forward_and_a_clipped_gradient_backward(gradient: list[float], seed: int) -> None:
    """Forward a one-hot row whose token has mass; backward the gradient itself, clipped to [-1, 1], for every token."""
    delta = torch.tensor([[0.0, 0.3, 0.7, 0.0]], requires_grad=True)
    row = unlearndiffatk._drawn(delta, torch.Generator().manual_seed(seed))
    assert row.sum() == 1
    assert row[0, 1] + row[0, 2] == 1
    wanted = torch.tensor([gradient])
    row.backward(wanted)
    assert torch.equal(delta.grad, wanted.clamp(-1, 1))


def test_tokens_are_drawn_and_not_the_likeliest() -> None:
    """Of 60 draws with mass .3 and .7 both tokens come up (missed with p < .7^60 = 5e-10)."""
    rng, delta = torch.Generator().manual_seed(0), torch.tensor([[0.3, 0.7]])
    assert {int(unlearndiffatk._drawn(delta, rng).argmax()) for _ in range(60)} == {0, 1}


# --- words ------------------------------------------------------------------------------------------------------------


def test_placed_words_are_what_the_tokenizer_would_have_made() -> None:
    """The embeddings of tokens a</w>, b</w> put before "x" equal those of the prompt "a b x"; the hook is gone afterwards."""
    model = small.pipe()
    words = unlearndiffatk._Words(model, "x", 2)
    ids = model.tokenizer("a b x").input_ids[1:3]
    table = model.text_encoder.get_input_embeddings().weight
    found = words.encode(table[ids].detach())
    assert torch.allclose(found, model.encode(["a b x"]), atol=1e-6)
    assert not model.text_encoder.get_input_embeddings()._forward_hooks
    assert torch.equal(words.draw(table[ids].detach(), 3, SAMPLER), draw(model, ["a b x"], [3], SAMPLER)[0])


def test_special_tokens_are_no_candidates() -> None:
    """Start and end tokens would cut the prompt off; every other token can be taken."""
    words = unlearndiffatk._Words(small.pipe(), "x", 1)
    assert words.candidates.tolist() == list(range(2, 54))


def test_a_prompt_with_no_room_is_cut() -> None:
    """16 places, start and end: 14 letters fill them, two tokens take the places of the last two; 14 tokens would leave none for the prompt."""
    words, whole = (unlearndiffatk._Words(small.pipe(), " ".join("abcdefghijklmn"[:count]), 2) for count in (14, 12))
    assert words.ids.tolist() == whole.ids.tolist()
    assert words.ids.shape == (1, 16)
    assert unlearndiffatk._Words(small.pipe(), "a b c", 13).ids.shape == (1, 16)
    with pytest.raises(SpecError, match="14 adversarial tokens leave 2 places for start, prompt and end, which take at least 3; take fewer"):
        unlearndiffatk._Words(small.pipe(), "a", 14)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_error_at_a_noised_target(prediction: str) -> None:
    """By hand: x_t = sqrt(a) x_0 + sqrt(1 - a) eps, the mean square of eps_theta - eps, or of v_theta - (sqrt(a) eps - sqrt(1 - a) x_0); eps is new."""
    model = StableDiffusion(tiny.pipeline(prediction), small.CPU)
    x_0, t, text = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([499]), model.encode(["a x"])
    rng, again = (torch.Generator().manual_seed(2) for _ in range(2))
    first, second = (unlearndiffatk._denoising(model, x_0, t, text, rng) for _ in range(2))
    eps, a = torch.randn(x_0.shape, generator=again), model.schedule.alphas_cumprod[499]
    target = eps if prediction == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x_0
    by_hand = (model.predict(a.sqrt() * x_0 + (1 - a).sqrt() * eps, t, text) - target).square().mean()
    assert torch.allclose(first, by_hand, rtol=1e-4)
    assert second != first


# --- the attack -------------------------------------------------------------------------------------------------------


def found(model: Pipe, judge: Any, attack: Attack = QUICK, prompt: str = "a x") -> list[int] | None:
    """The attack on a tiny model."""
    return attack.attack(model, prompt, small.pictures(1)[0], 5, SAMPLER, judge)


def by_hand(gradient: Tensor, attack: Attack) -> list[Tensor]:
    """delta after each iteration under one constant gradient: Adam as Kingma and Ba write it, with decay in the gradient, then the sorted projection."""
    delta = torch.full_like(gradient, 1 / gradient.shape[1])
    m, v, seen = torch.zeros_like(delta), torch.zeros_like(delta), []
    for k in range(1, attack.timesteps * attack.iterations + 1):
        g = gradient + attack.weight_decay * delta
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        moved = delta - attack.lr * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
        delta = torch.stack([by_sorting(row) for row in moved])
        seen.append(delta)
    return seen


def test_the_tokens_move_as_the_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a loss that is linear in the token embeddings: the timesteps ascend, each with all its iterations; delta follows Adam on the clipped gradient and
    is projected after every step, from one timestep on to the next; after each timestep the likeliest tokens are drawn, from the prompt's
    own noise; x_0 is the mean of the target's posterior.
    """
    model, attack = small.pipe(), Attack(tokens=2, timesteps=3, iterations=4, lr=0.01, weight_decay=0.5)
    words, table = unlearndiffatk._Words(model, "a x", 2), model.text_encoder.get_input_embeddings().weight.detach()
    direction = 20 * torch.randn(2, table.shape[1], generator=torch.Generator().manual_seed(4))
    times, targets, shown, deltas = list[int](), list[Tensor](), list[Tensor](), list[Tensor]()

    def linear(pipe: Pipe, x_0: Tensor, t: Tensor, rows: Tensor, rng: torch.Generator) -> Tensor:
        times.append(int(t))
        targets.append(x_0)
        return (rows * direction).sum()

    def projected(rows: Tensor) -> Tensor:
        deltas.append(simplex(rows))
        return deltas[-1]

    def image(self: Any, rows: Tensor, seed: int, sampler: Sampler) -> Tensor:
        shown.append(rows)
        assert (seed, sampler) == (5, SAMPLER)
        return torch.zeros(3, 16, 16, dtype=torch.uint8)

    monkeypatch.setattr(unlearndiffatk, "_denoising", linear)
    monkeypatch.setattr(unlearndiffatk, "simplex", projected)
    monkeypatch.setattr(unlearndiffatk._Words, "encode", lambda self, rows: rows)
    monkeypatch.setattr(unlearndiffatk._Words, "draw", image)
    tokens = found(model, lambda image: len(shown) == 3, attack)
    gradient = direction @ table[words.candidates].T
    assert (gradient.abs() > 1).any()  # so that the clip can be seen
    expected = by_hand(gradient.clamp(-1, 1), attack)
    assert times == [166] * 4 + [499] * 4 + [832] * 4
    assert all(torch.equal(x_0, model.latents(small.pictures(1)[0][None])[0]) for x_0 in targets)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(deltas, expected, strict=True))
    best = [words.candidates[delta.argmax(dim=1)] for delta in expected[3::4]]
    assert all(torch.equal(rows, table[ids]) for rows, ids in zip(shown, best, strict=True))
    assert tokens == best[-1].tolist()


def test_it_stops_at_the_first_success_and_gives_up_at_the_end() -> None:
    """One image after each timestep: a judge who is content at once sees one, one who never is sees two, and then nothing is found."""
    seen: list[Tensor] = []
    assert found(small.pipe(), lambda image: seen.append(image) or True) is not None  # type: ignore[func-returns-value]
    assert len(seen) == 1
    assert found(small.pipe(), lambda image: bool(seen.append(image))) is None  # type: ignore[func-returns-value]
    assert len(seen) == 3


def test_the_cost_is_timesteps_by_iterations_and_an_image_after_each_timestep() -> None:
    """2 x 3 passes of one sample, and 2 images of 2 steps under guidance (4 passes each): 14."""
    model = small.pipe()
    found(model, lambda image: False)
    assert model.passes == 2 * 3 + 2 * 4


def test_the_same_seed_finds_the_same_tokens_and_the_weights_stay() -> None:
    """No weight moves and torch's global generator is left alone; another seed draws other tokens on the way."""
    model, before, state = small.pipe(), small.weights(small.pipe()), torch.get_rng_state()
    slow = replace(QUICK, iterations=10)
    runs = [found(each, lambda image: True, attack) for each, attack in ((model, slow), (small.pipe(), slow), (small.pipe(), replace(slow, seed=9)))]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert small.same(small.weights(model), before)
    assert torch.equal(state, torch.get_rng_state())


def test_the_loss_sees_the_unlearned_model_only() -> None:
    """Another UNet, other tokens: the attack depends on the model that it is given."""
    other = small.pipe()
    with torch.no_grad():
        for name, p in other.named().items():
            if ".attn2." in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    slow = replace(QUICK, iterations=10)
    assert found(small.pipe(), lambda image: True, slow) != found(other, lambda image: True, slow)


def test_optimisation_lowers_the_denoising_loss() -> None:
    """At one noise level, tokens found in 60 iterations predict the target's noise better than the mean of 20 random pairs."""
    model, target = small.pipe(), small.pictures(1)[0]
    with torch.no_grad():  # make the text matter to the tiny random model
        for name, p in model.named().items():
            if ".attn2." in name:
                p.mul_(4)
    tokens = found(model, lambda image: True, replace(QUICK, timesteps=1, iterations=60))
    words, table = unlearndiffatk._Words(model, "a x", 2), model.text_encoder.get_input_embeddings().weight.detach()
    x_0, _ = model.latents(target[None])
    rng = torch.Generator().manual_seed(3)

    def loss(ids: Any) -> float:
        draws = [unlearndiffatk._denoising(model, x_0, torch.tensor([499]), words.encode(table[ids]), torch.Generator().manual_seed(i)) for i in range(8)]
        return torch.stack(draws).mean().item()

    others = [loss(words.candidates[torch.randint(len(words.candidates), (2,), generator=rng)]) for _ in range(20)]
    with torch.no_grad():
        assert loss(tokens) < sum(others) / 20


@pytest.mark.parametrize("change", [{"tokens": 0}, {"timesteps": 0}, {"iterations": 0}])
def test_no_budget_is_no_attack(change: dict[str, int]) -> None:
    """An attack that may do nothing would pass every model."""
    with pytest.raises(SpecError, match="needs a budget"):
        replace(QUICK, **change)


def test_a_broken_model_is_an_error_and_no_resistance() -> None:
    """A loss that is not finite must not count as a failed attack."""
    model = small.pipe()
    with torch.no_grad():
        model.named()["unet.conv_in.weight"].fill_(float("nan"))
    with pytest.raises(PreconditionError, match="the attack's loss on 'a x' became nan"):
        found(model, lambda image: True)


class Eye:
    """A detector that calls an image "x" if its mean is above a threshold."""

    labels = ("x", "none")

    def __init__(self, threshold: float) -> None:
        self.threshold, self.address, self.seen = threshold, f"eye-{threshold}", 0

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities (n, 2)."""
        self.seen += len(images)
        shown = (images.mean((1, 2, 3)) > self.threshold).float()
        return torch.stack([shown, 1 - shown], dim=1)


def test_both_rates_are_of_the_same_prompts_and_kept(base: Base, tmp_path: Path) -> None:
    """Who shows the concept unattacked is a success of both and not attacked; the second look costs nothing."""
    engine, lineage = Engine(Store(tmp_path)), Lineage(base, tiny.task())
    asked = ImageSet(("a x", "the x"), (1, 2))
    always, never = Eye(-1.0), Eye(2.0)
    assert QUICK.rates(engine, lineage, asked, always, "x").tolist() == [[1, 1, 0], [1, 1, 0]]
    assert always.seen == 2
    assert QUICK.rates(engine, lineage, asked, never, "x").tolist() == [[0, 0, 0], [0, 0, 0]]
    assert never.seen == 2 + 2 * 2
    passes = engine.cost()["unet_passes"]
    assert QUICK.rates(engine, lineage, asked, never, "x").tolist() == [[0, 0, 0], [0, 0, 0]]
    assert engine.cost()["unet_passes"] == passes
    assert QUICK.rates(engine, lineage, asked, Eye(0.48), "x")[:, 0].le(QUICK.rates(engine, lineage, asked, Eye(0.48), "x")[:, 1]).all()


def test_the_tasks_rule_decides(base: Base, tmp_path: Path) -> None:
    """What the first rank misses is a success within the first two, kept under an address of its own."""
    engine, lineage = Engine(Store(tmp_path)), Lineage(base, tiny.task())
    asked, never = ImageSet(("a x",), (1,)), Eye(2.0)
    assert QUICK.rates(engine, lineage, asked, never, "x").tolist() == [[0, 0, 0]]
    assert QUICK.rates(engine, lineage, asked, never, "x", Rule(k=2)).tolist() == [[1, 1, 0]]


def test_prompts_are_cut_for_the_tokens_and_counted(base: Base, tmp_path: Path) -> None:
    """Of 16 places 14 are the prompt's own: 13 letters leave too few for two tokens, 16 are too many anyway, one is attacked as it is."""
    lines: list[str] = []
    engine, letters = Engine(Store(tmp_path), lines.append), "a b c d e f g h i j k l m n o p"
    asked = ImageSet(("a x", letters[:25], letters, letters[:23]), (1, 2, 3, 4))
    assert QUICK.rates(engine, Lineage(base, tiny.task()), asked, Eye(2.0), "x").tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert "unlearndiffatk: 2 of 4 prompts are cut to make room for 2 tokens" in lines
    assert "1 of 4 prompts are longer than the model reads and were cut" in lines
