"""DiMRA: ordinary training on data in which the forgotten concept does not occur."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.engine import Engine
from harness.errors import PreconditionError, SpecError
from harness.relearning.dimra import Attack
from harness.spec import Base, Group, Lineage, Task
from harness.store import Store
from harness.training import train
from harness.unlearning import dimum
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None, max_examples=50)
QUICK = Attack(steps=3, lr=1e-3, batch=2, images_per_prompt=1)
WORDS = ["Ada", "Bo Zephyr", "Cy", "Van Gogh", "x.y", "C++", "ada lovelace", "Ed", "Edward", "cat", "catfish"]
TEMPLATES = ["a photo of {}", "{} in person", "{} with Ada", "Bo Zephyr and {}", "the {}", "EDWARD beside {}"]


@st.composite
def raw(draw: st.DrawFn) -> tuple[Group, Group]:
    """An erased and a retain group, which may well name each other."""
    words = draw(st.permutations(WORDS))
    cut = draw(st.integers(1, 5))
    templates = st.lists(st.sampled_from(TEMPLATES), min_size=1, max_size=3, unique=True).map(tuple)
    return Group(tuple(words[:cut]), draw(templates)), Group(tuple(words[cut : cut + 3]), draw(templates))


def names(caption: str, concept: str) -> bool:
    """Whether a caption names a concept as a whole: letters and digits around it make another word."""
    at, caption, concept = -1, caption.lower(), concept.lower()
    while (at := caption.find(concept, at + 1)) >= 0:
        around = (caption[at - 1] if at else " ") + (caption[at + len(concept)] if at + len(concept) < len(caption) else " ")
        if not any(c.isalnum() or c == "_" for c in around):
            return True
    return False


@CALM
@given(groups=raw(), data=st.sampled_from(["retain", "auxiliary"]), per_prompt=st.integers(1, 3), seed=st.integers(0, 5))
def test_no_forget_sample_can_enter(groups: tuple[Group, Group], data: str, per_prompt: int, seed: int) -> None:
    """Either the task is refused, and then a caption does name an erased concept, or no caption of the attack does."""
    erased, retain = groups
    guilty = [p for c in retain.concepts for p in retain.asking(c) if any(names(p, each) for each in erased.concepts)]
    if guilty:
        with pytest.raises(SpecError, match="names the erased concept"):
            replace(tiny.task(), erased=erased, retain=retain)
        return
    task = replace(tiny.task(), erased=erased, retain=retain)
    drawn = Attack(data=data, images_per_prompt=per_prompt, seed=seed).images(task)["train"]  # type: ignore[arg-type]  # hypothesis gives str
    assert drawn.prompts
    assert not any(names(p, each) for p in drawn.prompts for each in erased.concepts)


@pytest.mark.parametrize("role", ["retain", "finetune"])
def test_a_benign_set_that_names_the_forgotten_is_refused(role: str) -> None:
    """In a template, in another case, inside another name: the error says which prompt and which concept."""
    task, guilty = tiny.task(), Group(("n",), ("a {} with X",))
    with pytest.raises(SpecError, match="'a n with X' names the erased concept 'x'"):
        replace(task, **{role: guilty if role == "retain" else {"in": guilty}})


def test_part_of_a_word_is_another_word() -> None:
    """Erasing x says nothing about a fox."""
    task = replace(tiny.task(), retain=Group(("fox", "x1"), ("a {}",)))
    assert Attack(images_per_prompt=1).images(task)["train"].prompts == ("a fox", "a x1")


def test_fine_tuning_sets_may_share_concepts_and_other_roles_may_not() -> None:
    """Two benign sets may overlap, as terciles of one pool do; a concept that is fine-tuned on may not be held out."""
    one = Group(("f",), ("a {}",))
    assert Task(**{**vars(tiny.task()), "finetune": {"in": one, "near": one}}).finetune["near"] == one
    with pytest.raises(SpecError, match="'r' is both"):
        replace(tiny.task(), finetune={"in": Group(("r",), ("a {}",))})


def test_assumption_i_is_the_very_set_the_method_learned_from() -> None:
    """Same prompts and seeds as DiMUM's retain set of the same seed; assumption (ii) has the same prompts and shares no seed."""
    task = tiny.task()
    mine, other = (Attack(data=data, seed=3).images(task)["train"] for data in ("retain", "auxiliary"))  # type: ignore[arg-type]
    assert mine == dimum.Method(seed=3).images(task)["retain"]
    assert other.prompts == mine.prompts
    assert not set(other.seeds) & set(mine.seeds)


def test_it_is_plain_training_on_the_auxiliary_set() -> None:
    """Eq. 7: bit for bit Adam on L_DM over D_aux, nothing else; 1F + 1B of `batch` images a step."""
    from harness.data import Captioned

    model, run = small.after(QUICK)
    assert model.passes == 3 * 2
    plain, task = small.pipe(), tiny.task()
    sets = QUICK.images(task)["train"]
    again = small.run(plain, QUICK, task)
    data = Captioned(plain, again.images["train"], sets.prompts)

    def loss(rng: torch.Generator) -> torch.Tensor:
        return plain.diffusion_loss(*data.batch(2, rng), rng)

    train(plain.parameters("unet").values(), loss, lambda rng: rng, again, steps=3, lr=1e-3)
    assert small.same(small.weights(model), small.weights(plain))
    assert run.losses == again.losses


def test_a_loss_that_turns_nan_leaves_the_earlier_snapshots(base: Base, tmp_path: Path) -> None:
    """At an absurd rate the loss overflows within 6 steps: an error that says at which, and the snapshot after 1 step is still there."""
    engine, root = Engine(Store(tmp_path)), Lineage(base, tiny.task())
    early, late = (root.then(replace(QUICK, lr=1e20, steps=k)) for k in (1, 6))
    failures = engine.build([late, early])
    assert set(failures) == {late.key}
    assert isinstance(failures[late.key], PreconditionError)
    assert engine.store.has(engine.folder(early))
    assert engine.load(early)
