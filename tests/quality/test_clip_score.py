"""CLIP score is the mean cosine of image and caption, and captions are read from what the user brings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.detection._clip import Clip
from harness.errors import SpecError
from harness.quality import captions
from harness.quality.clip_score import clip_score
from tests.detection._eyes_of import drawn

NAMES = ("cat", "guitar", "cactus", "umbrella")


def test_the_score_is_100_times_the_mean_cosine() -> None:
    """By hand from the pocket CLIP's vectors; pictures score higher with their own captions than with each other's."""
    clip, pictures = Clip("pocket"), (torch.cat([drawn(name) for name in NAMES]) * 255).byte()
    texts = [f"a photo of the {name}" for name in NAMES]
    figure = clip_score(pictures, texts, clip)
    cosines = [float(torch.cosine_similarity(clip.images(p[None].float() / 255), clip.texts([t]))) for p, t in zip(pictures, texts, strict=True)]
    assert figure.value == pytest.approx(100 * sum(cosines) / 4, abs=1e-3)
    assert figure.value > clip_score(pictures, texts[1:] + texts[:1], clip).value + 10
    for word in ("CLIP score (100 x cosine)", "CLIP clip", "64 features", "4 images", "own caption", "to 64 px"):
        assert word in str(figure)


def test_images_may_come_set_by_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same score; no more than a batch is a float at once."""
    clip, pictures, sizes = Clip("pocket"), (torch.cat([drawn(name) for name in NAMES]) * 255).byte(), list[int]()
    texts = [f"a photo of the {name}" for name in NAMES]
    whole, see = clip_score(pictures, texts, clip), clip.images
    monkeypatch.setattr(clip, "images", lambda images, batch: sizes.append(len(images)) or see(images, batch))
    found = clip_score(iter([pictures[:3], pictures[3:]]), texts, clip, batch=2)
    assert found.value == pytest.approx(whole.value, abs=1e-3)
    assert (found.count, sizes) == (4, [2, 1, 1])


def test_every_image_needs_its_caption() -> None:
    """One caption too few is an error, not a shorter mean."""
    with pytest.raises(SpecError, match="got 1 for 2"):
        clip_score(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a"], Clip("pocket"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.txt", "a cat\n\n a dog \na tree\n"),
        ("coco_10k.csv", "case_number,prompt,evaluation_seed\n0,a cat,1\n1,a dog,2\n2,a tree,3\n"),
        ("mine.csv", "caption\na cat\na dog\na tree\n"),
        (
            "captions_val2014.json",
            json.dumps({"annotations": [{"image_id": i, "caption": c} for i, c in ((7, "a cat"), (3, "a dog"), (7, "another"), (5, "a tree"))]}),
        ),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_captions_come_from_the_users_file(name: str, text: str, encoding: str, tmp_path: Path) -> None:
    """Lines, a column or COCO's annotations, of which each image's first caption counts; a byte-order mark is no part of them."""
    (tmp_path / name).write_text(text, encoding=encoding)
    assert captions.read(tmp_path / name) == ("a cat", "a dog", "a tree")
    assert captions.read(tmp_path / name, 2) == ("a cat", "a dog")
    with pytest.raises(SpecError, match="holds 3 captions, 4 are needed"):
        captions.read(tmp_path / name, 4)


@pytest.mark.parametrize(("name", "text"), [("a.csv", "id,words\n1,x\n"), ("a.json", "[]"), ("a.json", "{"), ("a.txt", "one\n")])
def test_what_holds_no_captions_is_refused(name: str, text: str, tmp_path: Path) -> None:
    """No such column, no annotations, broken JSON, too few."""
    (tmp_path / name).write_text(text)
    with pytest.raises(SpecError, match=name):
        captions.read(tmp_path / name)


def test_noise_belongs_to_the_caption_and_the_role() -> None:
    """Every model draws the same captions from the same noise; the reference has other noise."""
    [chosen] = captions.images(("a", "b", "a"))
    assert [chosen] == captions.images(("a", "b", "a"))
    assert len(set(chosen.seeds)) == 3
    assert not set(chosen.seeds) & set(captions.images(("a", "b", "a"), "quality reference")[0].seeds)


def test_many_captions_are_several_sets_of_images() -> None:
    """Each caption keeps the noise of its place among all, whatever the sets; up to a thousand are one set."""
    texts = tuple("abcdefg")
    [whole], parts = captions.images(texts), captions.images(texts, chunk=3)
    assert [part.prompts for part in parts] == [("a", "b", "c"), ("d", "e", "f"), ("g",)]
    assert sum((part.seeds for part in parts), ()) == whole.seeds
    assert [len(part.prompts) for part in captions.images(("a",) * 1001)] == [1000, 1]
