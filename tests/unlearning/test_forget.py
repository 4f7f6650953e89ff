"""What relabelling, trimming and masking methods share."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import catalogue
from harness.catalogue import Spec
from harness.errors import PreconditionError, SpecError
from harness.pipeline import StableDiffusion
from harness.spec import Group
from harness.unlearning import _forget as forget
from harness.unlearning import erasediff, salun, sfron, shs
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None, max_examples=100)  # a busy machine is no failure
METHODS = {"salun": salun, "shs": shs, "erasediff": erasediff, "sfron": sfron}
every_method = pytest.mark.parametrize("name", METHODS)


@CALM
@given(data=st.data(), sparsity=st.floats(0, 1))
def test_the_largest_scores_are_chosen(data: st.DataObject, sparsity: float) -> None:
    """Of n distinct scores in several tensors, the floor((1 - sparsity) n) largest; the shapes stay."""
    n = data.draw(st.integers(1, 60))
    values = np.array(data.draw(st.permutations(range(n))), dtype=np.float32)
    cut = data.draw(st.integers(0, n))
    scores = {"a": torch.tensor(values[:cut]), "b": torch.tensor(values[cut:]).view(-1, 1)}
    mask = forget.above(scores, sparsity)
    assert {name: m.shape for name, m in mask.items()} == {name: s.shape for name, s in scores.items()}
    count = int(np.floor((1 - sparsity) * n + 1e-6))
    chosen = torch.cat([scores[name][mask[name]] for name in scores])
    assert sorted(chosen.tolist()) == list(range(n - count, n))


@CALM
@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=30), sparsity=st.floats(0, 1))
def test_ties_at_the_threshold_are_left_out(scores: list[int], sparsity: float) -> None:
    """A tied score is in or out with its equals, and never more are chosen than asked for; 0 chooses all, 1 none."""
    mask = forget.above({"a": torch.tensor(scores).float()}, sparsity)["a"]
    for value in set(scores):
        assert len({bool(m) for m, s in zip(mask, scores, strict=True) if s == value}) == 1
    assert mask.sum() <= np.floor((1 - sparsity) * len(scores) + 1e-6)
    assert forget.above({"a": torch.tensor(scores).float()}, 0.0)["a"].all()
    assert not forget.above({"a": torch.tensor(scores).float()}, 1.0)["a"].any()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_without_guidance_the_guided_loss_is_the_diffusion_loss(prediction: str) -> None:
    """w = 0, for a model that predicts noise and for one that predicts v; w = 1 is another number."""
    pipe = StableDiffusion(tiny.pipeline(prediction), small.CPU)
    x_0, c = torch.randn(3, *pipe.latent_shape, generator=torch.Generator().manual_seed(1)), pipe.encode(["a x", "a y", "the x"])
    plain = pipe.diffusion_loss(x_0, c, torch.Generator().manual_seed(2))
    assert forget.guided_loss(pipe, 0.0, x_0, c, torch.Generator().manual_seed(2)) == pytest.approx(plain.item(), rel=1e-5)
    assert forget.guided_loss(pipe, 1.0, x_0, c, torch.Generator().manual_seed(2)) != pytest.approx(plain.item(), rel=1e-5)


def test_the_guided_loss_by_hand() -> None:
    """MSE of (1 + w) eps(x_t, t, c) - w eps(x_t, t, "") against the noise that made x_t; 2 samples an image."""
    pipe = small.pipe()
    seen = small.witness(pipe)
    x_0, c = torch.zeros(2, *pipe.latent_shape), pipe.encode(["a x", "a y"])
    loss = forget.guided_loss(pipe, 2.5, x_0, c, torch.Generator().manual_seed(2))
    (one,) = seen
    assert pipe.passes == 4
    noise = one.x_t[:2] / (1 - pipe.schedule.alphas_cumprod[one.t[:2]]).sqrt().view(-1, 1, 1, 1)
    assert loss == pytest.approx((3.5 * one.out[:2] - 2.5 * one.out[2:] - noise).square().mean().item(), rel=1e-4)
    assert torch.equal(one.embeddings, torch.cat([c, pipe.encode(["", ""])]))


def test_each_caption_gets_its_anchor() -> None:
    """Concept by concept, prompt by prompt, image by image; two anchors for three targets are used in turn."""
    task = replace(tiny.task(), erased=Group(("x", "y", "z"), ("a {}", "{} here")), anchor=Group(("p", "q"), ("the {}",)))
    sets = forget.image_sets(task, 2, 0)
    pairs = list(zip(sets["forget"].prompts, forget.renamed(task, sets["forget"]), strict=True))
    assert pairs == [(t.replace("{}", a), t.replace("{}", b)) for a, b in (("x", "p"), ("y", "q"), ("z", "p")) for t in ("a {}", "{} here") for _ in range(2)]


@every_method
def test_the_forget_set_shows_the_erased_and_the_retain_set_the_retained(name: str) -> None:
    """Every prompt of the role `images_per_prompt` times, and nothing else."""
    sets = METHODS[name].Method(images_per_prompt=3).images(tiny.task())
    assert sets.keys() == {"forget", "retain"}
    for key, group in (("forget", tiny.task().erased), ("retain", tiny.task().retain)):
        assert sorted(sets[key].prompts) == sorted(3 * [p for c in group.concepts for p in group.asking(c)])


@every_method
def test_a_target_that_is_its_own_anchor_is_refused(name: str) -> None:
    """Relabelling x as X would forget nothing: the error names both and [anchor]."""
    task = SimpleNamespace(erased=Group(("x",), ("a {}",)), anchor=Group(("X",), ("a {}",)), retain=tiny.task().retain)
    with pytest.raises(SpecError, match=r"'x' is to become.*\[anchor\]"):
        small.after(METHODS[name].Method(steps=1), task)


@every_method
def test_without_images_to_retain_there_is_no_run(name: str) -> None:
    """No concept in [retain], or no image of it: the error names the role and the field."""
    empty = SimpleNamespace(concepts=(), prompts=("a {}",), asking=lambda concept: ())
    task = SimpleNamespace(erased=tiny.task().erased, anchor=tiny.task().anchor, retain=empty)
    with pytest.raises(SpecError, match=r"no image to retain.*\[retain\]"):
        METHODS[name].Method().images(task)
    with pytest.raises(SpecError, match=r"images_per_prompt.*got 0"):
        METHODS[name].Method(images_per_prompt=0).images(tiny.task())


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["salun", "shs"])
def test_a_share_outside_0_and_1_is_refused(name: str, sparsity: float) -> None:
    """The error names the field and the limits."""
    with pytest.raises(SpecError, match=r"sparsity .* \[0, 1\], got"):
        METHODS[name].Method(sparsity=sparsity)


@every_method
def test_a_loss_that_is_no_number_stops_the_run(name: str) -> None:
    """A weight that is NaN: the run ends with an error, whether the scores or the first step meet it."""
    model = small.pipe()
    with torch.no_grad():
        model.named()["unet.conv_in.weight"].fill_(float("nan"))
    for change in ({}, {"barrier": "constant"} if name == "erasediff" else {"gamma": 0.0} if name == "sfron" else {"sparsity": 0.0}):
        with pytest.raises(PreconditionError, match="nan"):
            small.after(METHODS[name].Method(steps=1, images_per_prompt=1, **change), model=model)


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name, module in METHODS.items() for preset in module.PRESETS])
def test_presets_can_be_written_on_the_command_line(name: str, preset: str) -> None:
    """Each is a method string of its own method, understood by the catalogue, and runs."""
    text = METHODS[name].PRESETS[preset]
    stage = catalogue.make("unlearning", Spec.parse(text), {})
    assert type(stage) is METHODS[name].Method
    before = small.weights(small.pipe())
    model, _ = small.after(replace(stage, steps=1, images_per_prompt=1, batch=2))
    assert small.moved(before, small.weights(model))
