"""SDD: the student learns to answer the concept as it answers nothing; what is kept is its moving average."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.errors import PreconditionError, SpecError
from harness.pipeline import Pipe, group
from harness.spec import Task
from harness.training import CARRIED
from harness.unlearning import ca, esd
from harness.unlearning.sdd import Method
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None)  # a busy machine is no failure
QUICK = Method(steps=3, lr=1e-2, batch=2, sampler_steps=4, decay=0.5)
X = group("x")
TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def asking(*erased: str) -> Task:
    """The tiny task with other erased names."""
    return replace(tiny.task(), erased=replace(tiny.task().erased, concepts=erased))


def steps_of(seen: list[small.Pass]) -> list[list[small.Pass]]:
    """The UNet passes step by step: each step ends with the one that learns."""
    ends = [i + 1 for i, each in enumerate(seen) if each.learns]
    return [seen[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def student_of(pipe: Pipe, run: object) -> dict[str, Tensor]:
    """The student, out of the run's state."""
    return {name: run.state[CARRIED + name] for name in small.weights(pipe, X)}  # type: ignore[attr-defined]  # a Run


def gradients(stage: object, batch_of: object = None) -> tuple[float, dict[str, Tensor], tuple[Tensor, ...]]:
    """Loss, gradients of the cross-attention and the batch of a stage's first step, asked for "x" alone."""
    model, task = small.pipe(), asking("x")
    run = small.run(model, stage, task)
    moving = model.parameters("x")
    loss, batch_at = stage.objective(model, task, run)  # type: ignore[attr-defined]  # every gradient method has one
    batch = batch_of(model) if batch_of else batch_at(run.rng("step", 0))  # type: ignore[operator]
    value = loss(batch)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in moving.items() if p.grad is not None}, batch


# --- student and teacher ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.25, 0.9, 0.999])
def test_after_one_step_the_teacher_has_gone_one_minus_m_of_the_students_way(decay: float) -> None:
    """teacher - theta_0 = (1 - m)(student - theta_0), and the teacher is what is left in the model."""
    before = small.weights(small.pipe(), X)
    model, run = small.after(replace(QUICK, steps=1, decay=decay))
    student, teacher = student_of(model, run), small.weights(model, X)
    assert small.moved(before, student) == set(before)
    for name, start in before.items():
        assert torch.allclose(teacher[name] - start, (1 - decay) * (student[name] - start), rtol=1e-3, atol=2e-7)


@CALM
@given(decay=st.floats(0.1, 0.99), steps=st.integers(1, 30), corrected=st.booleans(), seed=st.integers(0, 1000))
def test_the_shares_are_those_of_the_moving_average(decay: float, steps: int, corrected: bool, seed: int) -> None:
    """Students s_1 .. s_k from theta_0: T_k = m^k theta_0 + (1 - m) sum_i m^(k - i) s_i; corrected it is (T_k - m^k theta_0) / (1 - m^k)."""
    start, *students = torch.randn(steps + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    method, teacher = Method(decay=decay, corrected=corrected), start
    for i, student in enumerate(students, 1):
        teacher += method.weight(i) * (student - teacher)
    expected = sum((1 - decay) * decay ** (steps - i) * student for i, student in enumerate(students, 1))
    expected = expected / (1 - decay**steps) if corrected else expected + decay**steps * start
    assert teacher == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("decay", "corrected"), [(0.5, False), (0.5, True), (0.9, True)])
def test_a_resumed_run_equals_an_unbroken_one(decay: float, corrected: bool) -> None:
    """Stopped after 2 of 5 steps: from the teacher in the checkpoint and the student in the state, the same bits follow."""
    stage = replace(QUICK, decay=decay, corrected=corrected)
    whole, unbroken = small.after(replace(stage, steps=5))
    model, first = small.after(replace(stage, steps=2))
    fresh, original = small.pipe(), small.weights(small.pipe(), X)
    fresh.apply(small.weights(model, X))  # as the engine does: the checkpoint holds the teacher
    second = small.run(fresh, stage, tiny.task(), original=original, start=2, state=first.state)
    replace(stage, steps=5)(fresh, tiny.task(), second)
    assert small.same(small.weights(whole), small.weights(fresh))
    assert small.same(unbroken.state, second.state)
    assert unbroken.losses == first.losses + second.losses


def test_without_memory_the_teacher_is_the_student() -> None:
    """m = 0: the result is the student's own weights, bit for bit."""
    model, run = small.after(replace(QUICK, decay=0.0))
    assert small.same(small.weights(model, X), student_of(model, run))


def test_a_teacher_that_never_moves_is_the_original() -> None:
    """m = 1: the model is bit for bit what it was, though the student has moved."""
    before = small.weights(small.pipe())
    model, run = small.after(replace(QUICK, decay=1.0))
    assert small.same(before, small.weights(model))
    assert small.moved(small.weights(model, X), student_of(model, run))


def test_corrected_the_first_teacher_is_the_first_student() -> None:
    """k = 1: (1 - m) / (1 - m^1) = 1, whatever m; uncorrected, 1 - m of it."""
    model, run = small.after(replace(QUICK, steps=1, decay=0.999, corrected=True))
    assert small.same(small.weights(model, X), student_of(model, run))
    plain, its = small.after(replace(QUICK, steps=1, decay=0.999))
    assert small.moved(small.weights(plain, X), student_of(plain, its))


def test_the_teacher_draws_x_t_and_the_student_answers() -> None:
    """Within a step all sampling sees one weight, the teacher's: half way (m = 1/2) from the last to the student's; the other passes see the student's."""
    model = small.pipe()
    seen = small.witness(model)
    _, run = small.after(replace(QUICK, steps=8), model=model)
    steps = steps_of(seen)
    teacher = steps[0][-1].weight.clone()
    sampled = 0
    for i, step in enumerate(steps):
        *drawing, null, learning = step
        assert torch.equal(null.weight, learning.weight)
        if i:
            teacher = teacher.lerp(learning.weight, 0.5)
        assert all(torch.equal(each.weight, teacher) for each in drawing)
        assert i == 0 or not torch.equal(learning.weight, teacher)
        sampled += i > 0 and bool(drawing)
    assert sampled >= 2
    assert torch.equal(model.named()[TO_K], teacher.lerp(student_of(model, run)[TO_K], 0.5))


def test_with_and_without_the_average_the_weights_differ() -> None:
    """Signature: without the teacher (m = 0) other weights come out, in every tensor."""
    first, second = (small.weights(small.after(replace(QUICK, decay=decay))[0], X) for decay in (0.0, 0.5))
    assert small.moved(first, second) == set(first)


@pytest.mark.parametrize(
    ("field", "value"), [("guidance", 1.0), ("weight_decay", 0.5), ("clip", 1e-6), ("clip", 0.0), ("batch", 1), ("lr", 1e-3), ("sampler_steps", 3)]
)
def test_every_number_counts(field: str, value: float) -> None:
    """Each field of the training reaches it: with another value other weights come out, and no clip is not a wide or a narrow one."""
    stage = replace(QUICK, clip=1e-4)
    first, second = (small.weights(small.after(each)[0], X) for each in (stage, replace(stage, **{field: value})))
    assert small.moved(first, second)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_gap_between_the_concept_and_nothing() -> None:
    """One step: MSE of the student's pass under c_s and its pass under "", on the same x_t and t; only the first learns."""
    model = small.pipe()
    seen = small.witness(model)
    _, run = small.after(replace(QUICK, steps=1), asking("x"), model)
    *_, null, concept = seen
    assert torch.equal(null.x_t, concept.x_t)
    assert torch.equal(null.t, concept.t)
    assert torch.equal(null.embeddings, model.encode(["", ""]))
    assert torch.equal(concept.embeddings, model.encode(["x", "x"]))
    assert (null.learns, concept.learns) == (False, True)
    assert run.losses == [pytest.approx((concept.out - null.out).square().mean().item(), rel=1e-5)]


def test_the_empty_prompt_gives_neither_loss_nor_gradient() -> None:
    """c_s = "": both passes are the same, loss and gradient are exactly 0."""
    _, _, (x_t, t, _, null) = gradients(QUICK)
    value, found, _ = gradients(QUICK, lambda model: (x_t, t, null, null))
    assert value == 0
    assert found
    assert not any(g.any() for g in found.values())


def test_the_first_gradient_is_that_of_esd_without_eta_and_of_ca_with_the_empty_anchor() -> None:
    """At the start student, teacher and frozen model are one: ESD(eta = 0), SDD and CA (model-based, anchor "", no detached start token) agree on x_t, t."""
    loss, mine, batch = gradients(QUICK)
    x_t, t, c_s, null = batch
    with_esd = gradients(esd.Method(batch=2, sampler_steps=4, eta=0.0))
    assert torch.equal(with_esd[2][0], x_t)
    assert torch.equal(with_esd[2][1], t)
    with_ca = gradients(ca.Method(batch=2, images_per_prompt=1, detach_start=False, trains="x"), lambda model: (x_t, t, null, c_s, x_t))
    for value, found, _ in (with_esd, with_ca):
        assert value == pytest.approx(loss, rel=1e-4)
        assert found.keys() == mine.keys()
        assert all(torch.allclose(found[name], g, rtol=1e-3, atol=1e-4 * mine[TO_K].abs().max().item()) for name, g in mine.items())
    assert mine[TO_K].abs().max() > 0


# --- which texts, and what it costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("learns", ["iterative", "joint"])
@pytest.mark.parametrize("samples", ["iterative", "joint"])
def test_concepts_are_asked_for_in_turn_or_joined(samples: str, learns: str) -> None:
    """`sample_under` decides the prompt of x_t, `train_under` that of the loss: "x" or "y" for itself, or "x, y"; each image keeps its own."""
    model = small.pipe()
    seen = small.witness(model)
    stage = replace(QUICK, steps=6, batch=4, trains="x-strict", sample_under=samples, train_under=learns)
    small.after(stage, asking("x", "y"), model)
    allowed = {"iterative": [model.encode([name])[0] for name in ("x", "y")], "joint": [model.encode(["x, y"])[0]]}
    steps = steps_of(seen)
    drawn = [row for step in steps for each in step[:-2] for row in each.embeddings[4:]]
    learnt = [row for step in steps for row in step[-1].embeddings]
    for rows, which in ((drawn, samples), (learnt, learns)):
        counts = [sum(torch.equal(row, text) for row in rows) for text in allowed[which]]
        assert sum(counts) == len(rows)
        assert all(counts)
    if samples == learns:
        assert all(torch.equal(each.embeddings[4:], step[-1].embeddings) for step in steps for each in step[:-2])


@pytest.mark.parametrize(("batch", "sampler_steps", "guidance"), [(1, 1, 3.0), (2, 4, 3.0), (3, 3, 1.0)])
def test_a_step_costs_two_passes_of_the_student_besides_the_sampling(batch: int, sampler_steps: int, guidance: float) -> None:
    """Per image 1F without and 1F+1B with gradient, and `stop` sampling passes, twice that under guidance; `stop` is read off t."""
    model = small.pipe()
    seen = small.witness(model)
    small.after(replace(QUICK, batch=batch, sampler_steps=sampler_steps, guidance=guidance), model=model)
    scheduler = model.scheduler()
    scheduler.set_timesteps(sampler_steps)
    stops = [scheduler.timesteps.tolist().index(step[-1].t.item()) for step in steps_of(seen)]
    assert len(stops) == 3
    assert sum(each.learns for each in seen) == 3
    assert model.passes == batch * sum(2 + (1 if guidance == 1 else 2) * stop for stop in stops)


def test_no_sampling_step_means_pure_noise_at_the_noisiest_timestep() -> None:
    """With one sampling step, `stop` is always 0: x_t is standard normal noise and never a finished picture, t is the sampler's first, 1 of 1."""
    model = small.pipe()
    seen = small.witness(model)
    small.after(replace(QUICK, steps=40, sampler_steps=1, lr=0.0, trains="x-strict"), model=model)
    scheduler = model.scheduler()
    scheduler.set_timesteps(1)
    assert {each.t.item() for each in seen} == set(scheduler.timesteps.tolist())
    assert len(seen) == 80
    assert torch.cat([each.x_t for each in seen[::2]]).std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("trains", ["x", "x-strict", "u"])
def test_only_the_named_group_moves(trains: str) -> None:
    """The rest of the model stays bit for bit, and so do the weights kept from before."""
    before = small.weights(small.pipe())
    model, run = small.after(replace(QUICK, trains=trains))
    changed = small.moved(before, small.weights(model))
    assert changed
    assert all(group(trains)(name) for name in changed)
    assert small.same(dict(run.original), {name: w for name, w in before.items() if group(trains)(name)})


def test_without_a_teacher_the_objective_samples_from_the_model_before_unlearning() -> None:
    """What wraps the loss brings no average: x_t is then drawn by `run.original`, wherever the student has gone."""
    model, task = small.pipe(), tiny.task()
    run = small.run(model, QUICK, task)
    _, batch_at = QUICK.objective(model, task, run)
    expected = batch_at(run.rng("step", 1))[0]
    for p in model.parameters("x").values():
        p.data.add_(0.1)
    assert torch.equal(batch_at(run.rng("step", 1))[0], expected)


# --- requests that cannot be meant ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "message"), [(("x", ""), "empty prompt.*`erased`"), (("12",), "empty prompt.*`erased`"), (("x" * 15,), "`erased`.*shorten")])
def test_names_that_say_nothing_or_too_much_are_refused(names: tuple[str, ...], message: str) -> None:
    """Nothing for the tokenizer, or 17 tokens of 16: an error that names the task's `erased`."""
    with pytest.raises(SpecError, match=message):
        small.after(QUICK, asking(*names))


@pytest.mark.parametrize("field", ["sample_under", "train_under"])
def test_names_that_do_not_fit_when_joined_are_refused(field: str) -> None:
    """Two names of 9 letters are too long together: the error names the field that joins them and the way out."""
    stage = replace(QUICK, **{"sample_under": "iterative", "train_under": "iterative", field: "joint"})
    with pytest.raises(SpecError, match=f"`{field}` is 'joint': .*set `{field}` to 'iterative'"):
        small.after(stage, asking("x" * 9, "y" * 9))


@pytest.mark.parametrize(
    ("fields", "message"), [({"decay": -0.1}, "decay"), ({"decay": 1.5}, "decay"), ({"decay": 1.0, "corrected": True}, "decay"), ({"batch": 0}, "batch")]
)
def test_numbers_out_of_range_are_refused(fields: dict[str, float], message: str) -> None:
    """An average that runs away, 0 / 0, an empty batch: the error names the field."""
    with pytest.raises(SpecError, match=f"`{message}` must"):
        Method(**fields)  # type: ignore[arg-type]


def test_a_loss_that_is_not_a_number_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the prediction: an error with step and learning rate."""
    model = small.pipe()
    monkeypatch.setattr(model, "predict", lambda x, t, c: x * float("nan") * model.named()[TO_K].sum())
    with pytest.raises(PreconditionError, match="nan at step 1 of 3; try a smaller lr"):
        small.after(QUICK, model=model)


def test_a_group_that_matches_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without cross-attention has nothing for `x` to train: the error names group and choices."""
    model, task = small.pipe(), tiny.task()
    run, named = small.run(model, QUICK, task), {name: p for name, p in model.named().items() if not X(name)}
    monkeypatch.setattr(model, "named", lambda: named)
    with pytest.raises(SpecError, match=r"'x' matches nothing .* allowed"):
        QUICK(model, task, run)


def test_sdd_asks_for_no_images() -> None:
    """SDD needs names only, and sees nothing but the erased concepts."""
    assert Method().images(tiny.task()) == {}
    assert Method.reads == ("erased",)
