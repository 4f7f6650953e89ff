"""Meta-unlearning around a method: the base method is untouched by it, and the meta term is what it adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

from harness import catalogue
from harness.catalogue import Spec
from harness.engine import Engine
from harness.errors import SpecError
from harness.meta import _gradient
from harness.meta.meta import Method
from harness.pipeline import Pipe
from harness.relearning.dimra import Attack
from harness.spec import Base, Lineage
from harness.store import Store
from harness.unlearning import dimum, esd, uce
from tests import tiny
from tests.conftest import Child, die
from tests.unlearning import _small as small

ESD = esd.Method(steps=3, lr=1e-3, batch=2, sampler_steps=3, trains="x")
DIMUM = dimum.Method(steps=3, lr=1e-3, batch=2, images_per_prompt=1)
QUICK: dict[str, Any] = {"gamma_2": 0.5, "tau": 1e-2, "batch": 2, "images_per_prompt": 1}
BASES = pytest.mark.parametrize("base", [ESD, DIMUM], ids=["esd", "dimum"])


def moved(stage: Any) -> set[str]:
    """What a stage changes in the tiny model."""
    return small.moved(small.weights(small.pipe()), small.weights(small.after(stage)[0]))


@BASES
def test_without_the_meta_term_the_weights_are_the_base_methods(base: Any) -> None:
    """gamma_2 = 0: weights, optimizer and losses bit for bit; gamma_2 > 0: not."""
    plain, plain_run = small.after(base)
    none, none_run = small.after(Method.around(base, **{**QUICK, "gamma_2": 0.0}))
    some, _ = small.after(Method.around(base, **QUICK))
    assert small.same(small.weights(plain), small.weights(none))
    assert small.same(plain_run.state, none_run.state)
    assert plain_run.losses == none_run.losses
    assert small.moved(small.weights(plain), small.weights(some))


@BASES
def test_the_base_methods_batches_do_not_depend_on_the_meta_term(base: Any) -> None:
    """The first loss is taken before anything moved: with and without the meta term it is the same number."""
    first = [small.after(Method.around(base, **{**QUICK, "gamma_2": gamma}))[1].losses[0] for gamma in (0.0, 0.5)]
    assert first[0] == first[1]


@pytest.mark.parametrize(
    "change", [{"zeta": 5.0}, {"tau": 1.0}, {"inner_steps": 2}, {"inner": "adam"}, {"gamma_1": 0.5}, {"order": "exact"}, {"order": "hvp"}, {"gamma_2": 0.2}]
)
def test_every_part_of_the_meta_term_matters(change: dict[str, Any]) -> None:
    """Signature: each of zeta, tau, M, the inner optimizer, both gammas and the order changes the weights."""
    whole, other = (small.weights(small.after(Method.around(ESD, **{**QUICK, "tau": 0.1, **c}))[0]) for c in ({}, change))
    assert small.moved(whole, other)


def test_the_meta_gradient_alone_is_gamma_2_times_what_the_gradient_module_gives() -> None:
    """Second stage, one step: the gradient left in the model is that of `_gradient.add` on the step's own batches, clipped to norm 1."""
    model, stage = small.pipe(), Method(steps=1, lr=0.0, trains="x", **QUICK)
    run = small.run(model, stage, tiny.task())
    stage(model, tiny.task(), run)
    found = torch.cat([p.grad.flatten() for p in model.named().values() if p.grad is not None])
    again = small.pipe()
    parameters = list(again.parameters("x").values())
    stage._extra(again, tiny.task(), run)(parameters)
    alone = torch.cat([p.grad.flatten() for p in parameters])
    assert alone.norm() > 0
    assert torch.allclose(found, alone / max(1.0, alone.norm().item()), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("order", "expected"),
    [("first", ["retain", "forget", "forget", "forget", "retain"]), ("exact", ["retain", *["forget"] * 3, "retain", "forget", "forget"])],
)
def test_each_term_sees_its_own_data(order: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """L_R at theta, M = 2 inner steps on D_FT, then L_F and L_R at theta'; exact looks at the inner batches again, last one first. Both retain terms
    and both looks at an inner batch are on the same draws.
    """
    model, stage, seen, draws = (
        small.pipe(),
        Method(steps=1, trains="x", **{**QUICK, "inner_steps": 2, "order": order}),
        list[str](),
        list[tuple[bytes, bytes]](),
    )
    forget, plain = model.encode(["a x", "the x", "a y", "the y"]), model.diffusion_loss

    def listen(x_0: torch.Tensor, embeddings: torch.Tensor, rng: Generator) -> torch.Tensor:
        of_forget = [bool((forget == row).flatten(1).all(1).any()) for row in embeddings]
        assert len(set(of_forget)) == 1
        seen.append("forget" if of_forget[0] else "retain")
        draws.append((x_0.numpy().tobytes(), rng.get_state().numpy().tobytes()))
        return plain(x_0, embeddings, rng)

    monkeypatch.setattr(model, "diffusion_loss", listen)
    run = small.run(model, stage, tiny.task())
    stage._extra(model, tiny.task(), run)(list(model.parameters("x").values()))
    assert seen == expected
    assert draws[0] == draws[4]
    assert [len(set(part)) for part in zip(*draws[:4], strict=True)] == [4, 4]  # images, and noise and timesteps
    assert draws[5:] == ([draws[2], draws[1]] if order == "exact" else [])


@pytest.mark.parametrize("trains", ["x", "unet"])
def test_the_second_stage_moves_its_group_after_a_closed_form(trains: str) -> None:
    """`base=None` after UCE: only the trained group moves, and with gamma_2 = 0 nothing does."""
    model = small.after(uce.Method())[0]
    before = small.weights(model)
    small.after(Method(steps=2, lr=0.01, trains=trains, **{**QUICK, "gamma_2": 0.0}), model=model)
    assert small.same(small.weights(model), before)
    small.after(Method(steps=2, lr=0.01, trains=trains, **QUICK), model=model)
    changed = small.moved(before, small.weights(model))
    assert changed
    assert all(name.startswith("unet.") and (trains == "unet" or ".attn2." in name) for name in changed)


def test_the_meta_term_raises_the_loss_after_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is for: after the second stage an inner step leads to a higher L_F(theta') than before, on draws not seen."""
    stage = Method(steps=15, lr=3e-3, gamma_2=1.0, zeta=0.0, tau=1e-2, batch=4, images_per_prompt=1)
    models, seen, add = (small.pipe(), small.after(stage)[0]), list[float](), _gradient.add

    def listen(*terms: Any, **how: Any) -> float:
        seen.append(add(*terms, **how))
        return seen[-1]

    monkeypatch.setattr(_gradient, "add", listen)
    for model in models:
        run = small.run(model, stage, tiny.task(), seed=99)
        stage._extra(model, tiny.task(), run)(list(model.parameters("unet").values()))
    before, after = (-value for value in seen)  # zeta = 0: L_meta = -L_F(theta')
    assert after > before


@pytest.mark.parametrize("order", ["first", "exact"])
@BASES
def test_a_chain_of_two_runs_is_one(base: Any, order: str) -> None:
    """One step continued to three equals three at once, bit for bit: the meta term's draws depend on the absolute step."""

    def stage(steps: int) -> Method:
        return Method.around(base, steps=steps, order=order, **QUICK)

    model, task = small.pipe(), tiny.task()
    first = small.run(model, stage(1), task)
    original = first.original
    stage(1)(model, task, first)
    second = small.run(model, stage(3), task, start=1, state=first.state, original=original)
    stage(3)(model, task, second)
    whole, run = small.after(stage(3))
    assert small.same(small.weights(model), small.weights(whole))
    assert small.same(second.state, run.state)


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}])
@pytest.mark.parametrize("base", [ESD, DIMUM, None], ids=["esd", "dimum", "second"])
def test_no_step_and_no_rate_leave_the_weights(base: Any, change: dict[str, Any]) -> None:
    """Bit for bit, although theta' was visited on the way."""
    stage = Method.around(base, **QUICK) if base else Method(steps=2, lr=1e-3, trains="x", **QUICK)
    assert moved(stage)
    assert not moved(replace(stage, **change))


def test_snapshots_share_a_trajectory_and_the_base_is_part_of_the_address() -> None:
    """Steps do not change the trajectory; a field of the base method, its class and every own field do."""

    def lineage(stage: Any) -> Lineage:
        return Lineage(Base("d", ""), tiny.task(), (stage,))

    stage = Method.around(ESD, **QUICK)
    assert lineage(stage).trajectory == lineage(replace(stage, steps=9)).trajectory
    assert lineage(stage).steps == 3
    others = [Method.around(replace(ESD, eta=2.0), **QUICK), Method.around(DIMUM, **QUICK), replace(stage, zeta=2.0), ESD]
    assert len({lineage(each).trajectory for each in (stage, *others)}) == 5
    assert "harness.unlearning.esd.Method" in str(lineage(stage).record())


def test_steps_rate_seed_and_group_are_the_bases_unless_given() -> None:
    """`around` takes them over; the base's own copies are blanked, so that one number has one place."""
    stage = Method.around(ESD, **QUICK)
    assert (stage.steps, stage.lr, stage.trains, stage.seed) == (3, 1e-3, "x", 0)
    assert (stage.base.steps, stage.base.lr) == (0, 0.0)
    assert stage._stage() == ESD
    assert Method.around(ESD, steps=7)._stage() == replace(ESD, steps=7)


def test_the_meta_sets_are_the_erased_and_the_retained_prompts() -> None:
    """D_FT asks for erased concepts only, D_r for none; the base's own sets stand beside them under their own names."""
    task, stage = tiny.task(), Method.around(DIMUM, **QUICK)
    sets = stage.images(task)
    assert set(sets) == {"retain", "alternative", "meta.forget", "meta.retain"}
    assert set(sets["meta.forget"].prompts) == {"a x", "the x", "a y", "the y"}
    assert set(sets["meta.retain"].prompts) == {"a k", "the k", "a l", "the l"}
    assert stage.reads == ("erased", "anchor", "retain", "sampler")
    assert sets["retain"] == DIMUM.images(task)["retain"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Method(base=uce.Method()), "has no loss to add to"),
        (lambda: Method.around(ESD, inner="adam", order="exact"), "take inner=sgd or order=first"),
        (lambda: Method.around(ESD, inner_steps=0), "inner_steps >= 1"),
        (lambda: Method.around(ESD, tau=-1.0), "tau >= 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: Any, message: str) -> None:
    """A closed form has no loss, Adam is not differentiated through, and a budget of nothing is no inner loop."""
    with pytest.raises(SpecError, match=message):
        wrong()


def test_the_base_methods_hooks_still_run() -> None:
    """The meta term is in the gradient before the base method's own mask sees it: a base that zeroes every gradient never moves."""
    model, task = small.pipe(), tiny.task()

    class Masked(esd.Method):
        """ESD under a mask of zeros."""

        def __call__(self, pipe: Pipe, task: Any, run: Any) -> None:
            from harness.training import train

            moving = list(pipe.parameters(self.trains).values())
            train(moving, *self.objective(pipe, task, run), run, steps=self.steps, lr=self.lr, adjust=lambda: [p.grad.zero_() for p in moving])

    before = small.weights(model)
    small.after(Method.around(Masked(steps=2, lr=0.1, batch=1, sampler_steps=2), **QUICK), task, model)
    assert small.same(small.weights(model), before)


def test_exact_goes_through_the_attention_of_the_model() -> None:
    """On the tiny UNet in float64: the exact meta-gradient along a random direction is the central difference of L_meta to 1e-5."""
    model, task = small.pipe(), tiny.task()
    model.unet.double()
    x = torch.randn(2, 4, 4, 4, generator=Generator().manual_seed(0), dtype=torch.float64)
    c = model.encode(["a x", "a k"]).double()
    parameters = list(model.parameters("x").values())

    def loss(i: int) -> _gradient.Loss:
        return lambda: model.predict(x[[i]], torch.tensor(300), c[[i]]).square().mean()

    how: dict[str, Any] = {"gamma": 1.0, "zeta": 0.5, "tau": 0.5}
    _gradient.add(parameters, [loss(0)], loss(0), loss(1), order="exact", **how)
    rng = Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=rng, dtype=torch.float64) for p in parameters]
    along = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True)).item()
    values = []
    for e in (1e-4, -2e-4):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=e)
        values.append(_gradient.add(parameters, [loss(0)], loss(0), loss(1), **how))
    assert along == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5)
    assert task


def test_a_meta_lineage_is_made_stopped_and_resumed(base: Base, tmp_path: Any, one_thread: None) -> None:
    """Through the engine: 1 step, then 2 in another process's place, equals 2 in a fresh store bit for bit."""
    task = tiny.task()

    def lineage(steps: int) -> Lineage:
        return Lineage(base, task, (Method.around(catalogue.make("unlearning", Spec("esd"), {}, batch=1, sampler_steps=2, lr=1e-3), steps=steps, **QUICK),))

    Engine(Store(tmp_path / "a")).checkpoint(lineage(1))
    folders = [Engine(Store(tmp_path / name)).checkpoint(lineage(2)) for name in ("a", "b")]
    assert (folders[0] / "weights.safetensors").read_bytes() == (folders[1] / "weights.safetensors").read_bytes()
    assert (folders[0] / "state.safetensors").read_bytes() == (folders[1] / "state.safetensors").read_bytes()


def _killed(base: Base, folder: Path, stages: list[Any]) -> None:
    """Make the short trajectory, then die in the second step of the long one."""
    engine = Engine(Store(folder))
    short, long = (Lineage(base, tiny.task(), (stage,)) for stage in stages)
    engine.checkpoint(short)
    engine._reporter = lambda lineage: lambda step, steps, loss: die() if step == 2 else None  # type: ignore[method-assign,return-value]
    engine.checkpoint(long)


@pytest.mark.parametrize("stage", [Method.around(ESD, **QUICK), Attack(lr=1e-3, batch=2, images_per_prompt=1)], ids=["meta", "dimra"])
def test_a_kill_costs_the_steps_since_the_last_snapshot(stage: Any, base: Base, tmp_path: Path, child: Callable[..., Child], one_thread: None) -> None:
    """Killed in step 2 of 3 after a snapshot at 1: what another process makes of it equals an unbroken run of 3 bit for bit."""
    stages = [replace(stage, steps=k) for k in (1, 3)]
    assert child(_killed, base, tmp_path / "a", stages).wait() == -9
    long = Lineage(base, tiny.task(), (stages[1],))
    engine = Engine(Store(tmp_path / "a"))
    assert engine._snapshot(long) == 1
    folders = [engine.checkpoint(long), Engine(Store(tmp_path / "b")).checkpoint(long)]
    for name in ("weights.safetensors", "state.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
