"""Malicious fine-tuning: on the forgotten concept itself, from the model's own images or from pictures that somebody brings."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from harness import pocket
from harness.errors import SpecError, StoreError
from harness.relearning import _folder
from harness.relearning.malicious import Attack
from harness.spec import Base, Group, Lineage
from tests import tiny
from tests.unlearning import _small as small

QUICK = Attack(steps=2, lr=1e-3, batch=2, images_per_concept=2)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures each of x and y, one of x's in a file of two pages; and a note."""
    for concept, colour in (("x", 10), ("y", 200)):
        (tmp_path / concept).mkdir()
        frames = [Image.new("RGB", (20, 20), (colour + i, 0, 0)) for i in range(3)]
        frames[0].save(tmp_path / concept / "0.png")
        frames[1].save(tmp_path / concept / "1.tiff", save_all=True, append_images=frames[2:])
    (tmp_path / "x" / "notes.txt").write_text("not a picture")
    _folder.digest.cache_clear()
    return tmp_path


def asked(attack: Attack) -> Counter[str]:
    """How many images under each prompt."""
    return Counter(attack.images(tiny.task())["train"].prompts)


def test_one_and_several_forget_prompts_with_as_many_images() -> None:
    """HRM-s: the first prompt only; HRM-m: all of them; 4 images of each concept either way. CLEAN: one benign prompt each, no forget prompt."""
    assert asked(replace(QUICK, data="one", images_per_concept=4)) == Counter({"a x": 4, "a y": 4})
    assert asked(replace(QUICK, data="several", images_per_concept=4)) == Counter({"a x": 2, "the x": 2, "a y": 2, "the y": 2})
    assert asked(replace(QUICK, data="clean", images_per_concept=4)) == Counter({"a o": 4})


def test_clean_takes_five_concepts() -> None:
    """The paper's CLEAN set has five prompts."""
    task = replace(tiny.task(), finetune={"out": Group(tuple("bcdefgh"), ("a {}", "the {}"))})
    assert Counter(Attack(data="clean").images(task)["train"].prompts) == Counter({f"a {c}": 25 for c in "bcdef"})


def test_given_pictures_are_what_it_trains_on(pictures: Path) -> None:
    """With a folder, the base model draws nothing; both concepts' pictures come with the prompts in turn, at the model's size."""
    attack = replace(QUICK, source=str(pictures), digest="", images_per_concept=3)
    assert attack.images(tiny.task()) == {}
    images, captions = _folder.read(str(pictures), tiny.task().erased, 3, 16)
    assert images.shape == (6, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert images[:, 0].flatten(1).float().mean(1).tolist() == [10, 11, 12, 200, 201, 202]
    assert captions == ("a x", "the x", "a x", "a y", "the y", "a y")
    fewer, few = _folder.read(str(pictures), tiny.task().erased, 2, 16)
    assert fewer[:, 0].flatten(1).float().mean(1).tolist() == [10, 11, 200, 201]
    assert few == ("a x", "the x", "a y", "the y")
    model, run = small.after(attack)
    own, _ = small.after(QUICK)
    assert run.images["train"].shape == (6, 3, 16, 16)
    assert small.moved(small.weights(model), small.weights(own))


def test_the_address_is_the_content_and_not_the_place(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same pictures elsewhere are the same attack; one changed byte is another."""
    other = tmp_path_factory.mktemp("copy")
    for path in pictures.rglob("*.*"):
        (other / path.parent.name).mkdir(exist_ok=True)
        (other / path.parent.name / path.name).write_bytes(path.read_bytes())

    def key(place: Path) -> str:
        _folder.digest.cache_clear()
        return Lineage(Base("d", ""), tiny.task(), (replace(QUICK, source=str(place), digest=""),)).key

    assert key(pictures) == key(other)
    Image.new("RGB", (20, 20), (1, 2, 3)).save(other / "y" / "0.png")
    assert key(pictures) != key(other)
    assert key(pictures) != Lineage(Base("d", ""), tiny.task(), (QUICK,)).key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "/nowhere"}, "no pictures at '/nowhere'; give 'base', 'pocket', or a folder"),
        ({"images_per_concept": 0}, "images_per_concept must be at least 1, got 0"),
        ({"digest": "abc"}, "were they changed"),
    ],
)
def test_what_cannot_be_attacked_with_is_refused(change: dict[str, object], message: str) -> None:
    """A missing folder, no images at all, pictures that are not the ones meant."""
    with pytest.raises(SpecError, match=message):
        replace(QUICK, **{"digest": "", **change})  # type: ignore[arg-type]  # fields of several types


def test_too_few_pictures_are_an_error_that_counts(pictures: Path) -> None:
    """An attack on 4 pictures of each is not silently one on 3."""
    with pytest.raises(SpecError, match="3 pictures of 'x', the attack asks for 4"):
        small.after(replace(QUICK, source=str(pictures), digest="", images_per_concept=4))
    (pictures / "x" / "0.png").write_bytes(b"no picture")
    with pytest.raises(StoreError, match="not a readable picture"):
        _folder.read(str(pictures), tiny.task().erased, 1, 16)
    (pictures / "empty").mkdir()
    with pytest.raises(SpecError, match="holds no pictures"):
        _folder.digest(str(pictures / "empty"))


def test_an_uneven_number_of_images_is_refused() -> None:
    """Five images cannot be shared by two prompts."""
    with pytest.raises(SpecError, match="multiple of the 2 prompts, got 5"):
        replace(QUICK, images_per_concept=5).images(tiny.task())


def test_a_task_without_the_benign_set_says_so() -> None:
    """CLEAN needs a set of another domain."""
    with pytest.raises(SpecError, match="unknown fine-tuning set 'out'"):
        Attack(data="clean").images(replace(tiny.task(), finetune={"in": Group(("f",), ("a {}",))}))


def test_the_committed_renders_show_the_people_they_are_named_after() -> None:
    """The pocket detector names every one of the 25 renders of each development and report person."""
    from harness.detection.classifier import Detector

    people = [*pocket.identities("development"), *pocket.identities("report")]
    assert sorted(path.name for path in pocket.RENDERS.iterdir()) == sorted(people)
    images, captions = _folder.read("pocket", Group(tuple(people), ("{}",)), 25, 32)
    detector = Detector(folder="pocket")
    seen = [detector.labels[i] for i in detector(images.float() / 255).argmax(1)]
    assert sum(a == b for a, b in zip(seen, captions, strict=True)) >= 0.98 * len(captions)
    assert len(images) == 500
