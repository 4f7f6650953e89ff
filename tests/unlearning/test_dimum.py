"""DiMUM: the forgotten name is attached to something else, by an ordinary diffusion loss."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from harness.data import Captioned
from harness.errors import SpecError
from harness.pipeline import group
from harness.spec import Group, Task
from harness.training import train
from harness.unlearning.dimum import Method
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None, max_examples=50)  # a busy machine is no failure
QUICK = Method(steps=3, lr=1e-3, batch=2, images_per_prompt=1)
NAMES = ["Ada Quill", "Bo Zephyr", "Cy Vantrell", "Di Umber", "Ed Jorvik", "Flo Quince", "Gus Zane", "Hal Vex"]


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """Tasks of 1-3 erased and 1-3 retained people, an anchor, and 1-3 templates per role."""
    people = draw(st.permutations(NAMES))
    erased, retain = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    templates = st.lists(st.sampled_from(["a photo of {}", "{} in person", "the {}", "{}", "art: {}, oil"]), min_size=1, max_size=3, unique=True).map(tuple)
    anchor = draw(st.sampled_from(["a person", "someone", "somebody else"]))
    return replace(
        tiny.task(),
        erased=Group(tuple(people[:erased]), draw(templates)),
        retain=Group(tuple(people[erased : erased + retain]), draw(templates)),
        anchor=Group((anchor,), draw(templates)),
    )


# --- what it looks at -------------------------------------------------------------------------------------------------


@CALM
@given(task=tasks(), per_prompt=st.integers(1, 4))
def test_images_of_the_forgotten_are_never_read(task: Task, per_prompt: int) -> None:
    """No prompt that DiMUM has the base model draw names an erased concept: its alternative and the retain set are all it sees."""
    drawn = [p for chosen in Method(images_per_prompt=per_prompt).images(task).values() for p in chosen.prompts]
    assert drawn
    assert not [p for p in drawn for name in task.erased.concepts if name in p]


@CALM
@given(task=tasks(), per_prompt=st.integers(1, 4))
def test_every_erased_prompt_is_the_caption_of_as_many_images_of_the_alternative(task: Task, per_prompt: int) -> None:
    """Eq. 9: an image of the anchor under a template is called an erased concept under that template; each (concept, template) gets `per_prompt`."""
    method = Method(images_per_prompt=per_prompt)
    drawn = method.images(task)["alternative"].prompts
    captions = method._renamed(task, method.images(task)["alternative"])
    anchor = task.anchor.concepts[0]
    expected = Counter({(t.replace("{}", anchor), t.replace("{}", name)): per_prompt for t in task.erased.prompts for name in task.erased.concepts})
    assert Counter(zip(drawn, captions, strict=True)) == expected


def test_an_anchor_whose_name_is_part_of_a_template_is_renamed_once() -> None:
    """Anchor "person" in "a {} in person": the caption is "a x in person", not "a x in x"."""
    task = replace(tiny.task(), erased=Group(("x", "y"), ("a {} in person",)), anchor=Group(("person",), ("a {}",)))
    alternative = QUICK.images(task)["alternative"]
    assert alternative.prompts == ("a person in person",) * 2
    assert list(QUICK._renamed(task, alternative)) == ["a x in person", "a y in person"]


def test_the_counts_of_images_by_hand() -> None:
    """Tiny task, 2 erased and 2 retained names, 2 prompts, 5 images a prompt: 2 x 2 x 5 = 20 of each set; every seed once."""
    sets = Method(images_per_prompt=5).images(tiny.task())
    assert Counter(sets["retain"].prompts) == Counter({"a k": 5, "the k": 5, "a l": 5, "the l": 5})
    assert Counter(sets["alternative"].prompts) == Counter({"a p": 10, "the p": 10})
    assert [len(set(chosen.seeds)) for chosen in sets.values()] == [20, 20]


def test_two_alternatives_are_refused() -> None:
    """The target is paired with one alternative concept."""
    task = replace(tiny.task(), anchor=Group(("p", "q"), ("a {}",)))
    with pytest.raises(SpecError, match="anchor names 2"):
        QUICK.images(task)


# --- what it minimises ------------------------------------------------------------------------------------------------


def plain(steps: int, lr: float, batch: int) -> dict[str, Tensor]:
    """The weights after ordinary diffusion training on DiMUM's retain set, written without DiMUM."""
    model, task, stage = small.pipe(), tiny.task(), replace(QUICK, steps=steps)
    run = small.run(model, stage, task)
    data = Captioned(model, run.images["retain"], stage.images(task)["retain"].prompts)

    def batch_at(rng: Generator) -> tuple[Tensor, Tensor, Generator]:
        return *data.batch(batch, rng), rng

    train(model.parameters("unet").values(), lambda each: model.diffusion_loss(*each), batch_at, run, steps=steps, lr=lr)
    return small.weights(model)


def test_without_lambda_it_is_plain_diffusion_training_on_the_retain_set() -> None:
    """lam = 0: L = L_DM(D_r) + 0, bit for bit the weights of ordinary training with the same draws."""
    model, _ = small.after(replace(QUICK, lam=0.0))
    assert small.same(small.weights(model), plain(QUICK.steps, QUICK.lr, QUICK.batch))


def test_without_lambda_the_alternatives_images_do_not_matter() -> None:
    """lam = 0: other pixels in D_c, the same weights bit for bit; with lam = 1 they matter."""
    results = {}
    for lam in (0.0, 1.0):
        for seed in (1, 2):
            model, task, stage = small.pipe(), tiny.task(), replace(QUICK, lam=lam)
            run = small.run(model, stage, task)
            run.images = {**run.images, "alternative": small.pictures(len(run.images["alternative"]), seed)}
            stage(model, task, run)
            results[lam, seed] = small.weights(model)
    assert small.same(results[0.0, 1], results[0.0, 2])
    assert small.moved(results[1.0, 1], results[1.0, 2])


def test_with_and_without_the_forget_term_the_weights_differ() -> None:
    """Signature: lam = 1 and lam = 0 part at the first step, in every matrix of the cross-attention's keys and values."""
    first, second = (small.weights(small.after(replace(QUICK, lam=lam, steps=1))[0], group("x-strict")) for lam in (0.0, 1.0))
    assert small.moved(first, second) == set(first)


def test_the_forget_term_asks_for_the_noise_of_the_alternatives_image_under_the_erased_name() -> None:
    """One step, lam = 2: with the noise e taken back from x_t = sqrt(abar) x_0 + sqrt(1 - abar) e, the loss is MSE_r + 2 MSE_c. The captions are
    retained names in the first pass and erased ones in the second. All pictures of a set are alike and the posterior is taken at its mean.
    """
    model, task, stage = small.pipe(), tiny.task(), replace(QUICK, lam=2.0, steps=1)
    run = small.run(model, stage, task)
    run.images = {name: images[:1].expand_as(images) for name, images in run.images.items()}
    means = {name: model.latents(images[:1])[0] for name, images in run.images.items()}
    latents, model.latents = model.latents, lambda images: (latents(images)[0], torch.zeros(len(images), *model.latent_shape))  # type: ignore[method-assign]
    seen = small.witness(model)
    stage(model, task, run)
    parts = []
    for each, name in zip(seen, ("retain", "alternative"), strict=True):
        abar = model.schedule.alphas_cumprod[each.t].view(-1, 1, 1, 1)
        noise = (each.x_t - abar.sqrt() * means[name]) / (1 - abar).sqrt()
        assert noise.std() == pytest.approx(1, abs=0.5)
        parts.append((each.out - noise).square().mean().item())
    assert run.losses == [pytest.approx(parts[0] + 2 * parts[1], rel=1e-3)]
    names = [{p: model.encode([p])[0] for c in group_.concepts for p in group_.asking(c)} for group_ in (task.retain, task.erased)]
    for each, allowed in zip(seen, names, strict=True):
        assert all(any(torch.equal(row, text) for text in allowed.values()) for row in each.embeddings)


def test_a_step_costs_two_forward_and_two_backward_passes() -> None:
    """2F + 2B: one image of each set, so 2 x batch samples a step, and a gradient flows back from every one."""
    model = small.pipe()
    seen = small.witness(model)
    small.after(replace(QUICK, steps=3, batch=4), model=model)
    assert model.passes == 3 * 2 * 4
    assert all(each.learns for each in seen)


@pytest.mark.parametrize("trains", ["unet", "x"])
def test_only_the_named_group_moves(trains: str) -> None:
    """The UNet by default, the cross-attention if asked; the text encoder, the VAE and the rest stay bit for bit."""
    before = small.weights(small.pipe())
    model, _ = small.after(replace(QUICK, trains=trains))
    assert small.moved(before, small.weights(model)) == {name for name in before if group(trains)(name)}
