"""ESD: the target lies opposite to what names the concept, and only the student moves towards it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.pipeline import denoise, group
from harness.spec import Sampler
from harness.unlearning.esd import Method, target
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None)  # a busy machine is no failure
NUMBERS = st.floats(-100, 100)
QUICK = Method(steps=3, lr=1e-2, batch=2, sampler_steps=4, trains="x")


def steps_of(seen: list[small.Pass]) -> list[list[small.Pass]]:
    """The UNet passes step by step: each step ends with the student's own."""
    ends = [i + 1 for i, each in enumerate(seen) if each.learns]
    return [seen[start:end] for start, end in zip([0, *ends], ends, strict=False)]


# --- the target -------------------------------------------------------------------------------------------------------


def test_without_eta_the_target_is_the_unconditional_prediction() -> None:
    """eta = 0 leaves eps_null, bit for bit, whatever eps_c is."""
    null, c = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(target(null, c, 0.0), null)


@pytest.mark.parametrize(("eta", "expected"), [(1.0, [-1.0, 4.0]), (3.0, [-5.0, 10.0])])
def test_the_target_is_what_a_hand_computes(eta: float, expected: list[float]) -> None:
    """eps_null = (1, 1), eps_c = (3, -2): eta 1 gives 1 - 2 = -1 and 1 + 3 = 4; eta 3 gives 1 - 6 = -5 and 1 + 9 = 10."""
    assert target(torch.tensor([1.0, 1.0]), torch.tensor([3.0, -2.0]), eta).tolist() == expected


@CALM
@given(null=NUMBERS, c=NUMBERS, g=st.floats(0, 10))
def test_the_newer_codes_negative_guidance_is_eta_plus_one(null: float, c: float, g: float) -> None:
    """eps_c - g (eps_c - eps_null) = eps_null - (g - 1)(eps_c - eps_null): the new form with g is the paper's with eta = g - 1."""
    new_form = c - g * (c - null)
    paper = target(torch.tensor(null, dtype=torch.float64), torch.tensor(c, dtype=torch.float64), g - 1).item()
    assert paper == pytest.approx(new_form, abs=1e-10)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_the_first_loss_is_the_squared_gap_times_one_plus_eta_squared(eta: float) -> None:
    """At initialisation student = frozen model: eps_c - [eps_null - eta (eps_c - eps_null)] = (1 + eta)(eps_c - eps_null)."""
    model = small.pipe()
    seen = small.witness(model)
    _, run = small.after(replace(QUICK, eta=eta, steps=1), model=model)
    *_, frozen, student = seen
    null, c = frozen.out.chunk(2)
    assert torch.equal(frozen.x_t, torch.cat([student.x_t, student.x_t]))
    assert torch.equal(frozen.t, student.t)
    assert torch.equal(frozen.embeddings[2:], student.embeddings)
    assert torch.equal(frozen.embeddings[:2], model.encode(["", ""]))
    assert run.losses == [pytest.approx((1 + eta) ** 2 * (c - null).square().mean().item(), rel=1e-4)]


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_the_empty_concept_gives_neither_loss_nor_gradient(eta: float) -> None:
    """c = "": eps_c = eps_null, so the target is the student's own prediction for every eta (up to rounding between batch sizes)."""
    task = replace(tiny.task(), erased=replace(tiny.task().erased, concepts=("",)))
    nothing, something = (small.after(replace(QUICK, eta=eta, steps=1), each) for each in (task, tiny.task()))
    assert nothing[1].losses[0] < 1e-10 < 1e-8 < something[1].losses[0]
    gradients = [max(p.grad.abs().max().item() for p in model.named().values() if p.grad is not None) for model, _ in (nothing, something)]
    assert gradients[0] < 1e-6 < 1e-5 < gradients[1]


def test_with_and_without_eta_the_weights_differ() -> None:
    """Signature: eta only scales the first gradient, which Adam forgets; from the second step on it decides the weights."""
    first, second = (small.weights(small.after(replace(QUICK, eta=eta))[0], group("x")) for eta in (0.0, 1.0))
    assert all((first[name] - second[name]).abs().max() > 1e-4 for name in first if name.endswith("to_k.weight"))


def test_training_lowers_the_distance_to_the_target() -> None:
    """ESD is a regression on a frozen target: at a fixed noise level 25 steps on the cross-attention lower its loss to less than half."""
    _, run = small.after(replace(QUICK, steps=25, sampler_steps=1, batch=4, lr=3e-3))
    assert sum(run.losses[-5:]) / 5 < 0.5 * run.losses[0]


# --- frozen and student -----------------------------------------------------------------------------------------------


def test_the_target_always_comes_from_the_frozen_weights() -> None:
    """Both halves of the target see the weights before unlearning at every step; the student's pass sees the moved ones."""
    model = small.pipe()
    seen = small.witness(model)
    _, run = small.after(QUICK, model=model)
    original = run.original["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    frozen, student = zip(*((step[-2], step[-1]) for step in steps_of(seen)), strict=True)
    assert [torch.equal(each.weight, original) for each in frozen] == [True] * 3
    assert [torch.equal(each.weight, original) for each in student] == [True, False, False]


@pytest.mark.parametrize("trains", ["x", "x-strict", "u", "f", "selfattn"])
def test_only_the_named_group_moves_and_only_it_gets_gradients(trains: str) -> None:
    """The frozen copy stays bit for bit, the rest of the model too, and no gradient reaches either."""
    model, before = small.pipe(), small.weights(small.pipe())
    mine = group(trains)
    _, run = small.after(replace(QUICK, trains=trains, steps=2), model=model)
    assert small.same(run.original, {name: w for name, w in before.items() if mine(name)})
    assert not any(w.requires_grad or w.grad is not None for w in run.original.values())
    changed = small.moved(before, small.weights(model))
    assert changed
    assert all(mine(name) for name in changed)
    assert {name for name, p in model.named().items() if p.grad is not None} >= changed
    assert all(mine(name) for name, p in model.named().items() if p.grad is not None)


# --- x_t --------------------------------------------------------------------------------------------------------------


def test_no_sampling_step_leaves_the_initial_noise() -> None:
    """stop = 0: x_t is x_T (DDIM's init sigma is 1) at the sampler's noisiest timestep, (4 - 1) * 250 + 1 of 4 steps, at no cost."""
    model = small.pipe()
    x_T = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    x_t, t = denoise(model, x_T, model.encode(["x", "y"]), model.encode(["", ""]), Sampler(4, 3.0), stop=0)
    assert torch.equal(x_t, x_T)
    assert t.item() == 751
    assert model.passes == 0


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_the_announced_timestep_is_the_noise_level_of_x_t(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A UNet that predicts 0 makes DDIM scale x by sqrt(abar_next / abar_now) a step: x_t = sqrt(abar_t / abar_T) x_T, with t = (3 - stop) * 250 + 1."""
    model = small.pipe()
    monkeypatch.setattr(model, "predict", lambda x, t, embeddings: torch.zeros_like(x))
    x_T, c = torch.ones(1, 4, 4, 4), model.encode(["x"])
    x_t, t = denoise(model, x_T, c, c, Sampler(4, 3.0), stop)
    abar = model.schedule.alphas_cumprod
    assert t.item() == (3 - stop) * 250 + 1
    assert torch.allclose(x_t, (abar[t] / abar[751]).sqrt() * x_T, rtol=1e-5)


def test_every_step_of_the_sampler_can_be_drawn() -> None:
    """t is uniform over the sampler's own timesteps, ends included: 751, 501, 251 and 1 all come up in 40 draws (missed with p < 4 * .75^40 = 4e-5)."""
    model = small.pipe()
    seen = small.witness(model)
    small.after(replace(QUICK, steps=40, batch=1, lr=0.0, guidance=1.0, trains="x-strict"), model=model)
    assert {step[-1].t.item() for step in steps_of(seen)} == {751, 501, 251, 1}


def test_student_and_frozen_sampling_part_once_the_weights_move() -> None:
    """Both start with the same x_t; `student` draws later ones with moved weights, `frozen` never does."""
    seen = {}
    for source in ("student", "frozen"):
        model = small.pipe()
        seen[source] = small.witness(model)
        small.after(replace(QUICK, x_t_from=source, steps=6, sampler_steps=3, lr=0.05), model=model)
    student, frozen = (steps_of(each) for each in seen.values())
    assert [step[-1].t.item() for step in student] == [step[-1].t.item() for step in frozen]
    assert torch.equal(student[0][-1].x_t, frozen[0][-1].x_t)
    later = [(a[-1].x_t, b[-1].x_t) for a, b in zip(student, frozen, strict=True) if len(a) > 2][1:]
    assert later
    assert not any(torch.equal(a, b) for a, b in later)
    original = student[0][0].weight
    assert all(torch.equal(each.weight, original) for step in frozen for each in step[:-1])
    assert not any(torch.equal(each.weight, original) for step in student[1:] for each in step[:-2])


# --- what is asked, and what it costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "expected"), [("name", {"x", "y"}), ("task", {"a x", "the x", "a y", "the y"})])
def test_c_is_the_bare_name_or_the_name_in_the_tasks_prompts(prompts: str, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every erased concept is drawn in turn, and nothing but erased concepts and the empty prompt is ever encoded."""
    model, asked = small.pipe(), set[str]()
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda texts: asked.update(texts) or encode(texts))
    small.after(replace(QUICK, prompts=prompts, batch=8, sampler_steps=1, trains="x-strict"), model=model)
    assert asked == {"", *expected}


@pytest.mark.parametrize(
    ("batch", "sampler_steps", "guidance", "source"), [(1, 1, 3.0, "student"), (2, 4, 3.0, "frozen"), (3, 3, 3.0, "student"), (2, 4, 1.0, "frozen")]
)
def test_a_step_costs_two_frozen_and_one_trained_pass_besides_the_sampling(batch: int, sampler_steps: int, guidance: float, source: str) -> None:
    """Per image: 2 frozen + 1 trained + `stop` sampling passes, twice that many under guidance; `stop` is read off t."""
    model = small.pipe()
    seen = small.witness(model)
    small.after(replace(QUICK, batch=batch, sampler_steps=sampler_steps, guidance=guidance, x_t_from=source, trains="x-strict"), model=model)
    scheduler = model.scheduler()
    scheduler.set_timesteps(sampler_steps)
    stops = [scheduler.timesteps.tolist().index(step[-1].t.item()) for step in steps_of(seen)]
    assert len(stops) == 3
    assert model.passes == batch * sum(3 + (1 if guidance == 1 else 2) * stop for stop in stops)


def test_esd_asks_for_no_images() -> None:
    """ESD needs the concept's name only, and sees nothing but the erased concepts."""
    assert Method().images(tiny.task()) == {}
    assert Method.reads == ("erased",)
