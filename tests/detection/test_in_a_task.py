"""A task names detector and rule; a measurement follows the rule, and takes what else the detector says of the images that it counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.lab import Lab
from harness.detection._rule import Rule
from harness.engine import Engine
from harness.errors import SpecError
from harness.measurement import hits, measure, places
from harness.spec import Base, Group, ImageSet, Lineage, Task
from harness.stats import Sequential
from harness.store import Store
from tests import tiny

ROOT = Lineage(Base("digest", "nowhere"), tiny.task())
ASKED = Group(("x",), ("a {}", "the {}"))


class Eyes:
    """Two labels; says how many images it was asked about and which label was wanted."""

    labels, address = ("y", "x"), "scripted"

    @staticmethod
    def figures(scores: Tensor, wanted: Tensor) -> dict[str, float]:
        """What it was asked."""
        return {"images": len(scores), "wanted": float(wanted.float().mean()), "mean": float(scores[:, 1].mean())}


class Drawn:
    """An engine in whose images x has probability .4."""

    def scores(self, lineage: Lineage, wanted: tuple[ImageSet, Any], detector: Any) -> Tensor:
        """The same for every image."""
        return torch.tensor([[0.6, 0.4]] * len(wanted[0].prompts))

    def cut(self, lineage: Lineage, wanted: tuple[ImageSet, Any]) -> str:
        """Every prompt was read whole."""
        return ""


@pytest.mark.parametrize(("rule", "count"), [("top-1", 0), ("top-2", 40), ("threshold-0.4", 40), ("threshold-0.5", 0)])
def test_the_rule_decides_what_counts(rule: str, count: int) -> None:
    """x is second in every image with .4: a hit among the best two or at .4, none among the best one or at .5."""
    gate = Sequential(0.5, "below", 0.05, 1, 40, 200)
    measured = measure(Drawn(), ROOT, ASKED, Eyes(), gate, rule=Rule.parse(rule))  # type: ignore[arg-type]
    assert (measured.rate.k, measured.rate.n) == (count, 40)
    found = hits(Drawn(), ROOT, (ImageSet(("a", "b"), (1, 2)), ROOT.task.sampler), Eyes(), ["x", "x"], Rule.parse(rule))  # type: ignore[arg-type]
    assert found.tolist() == [[int(count > 0)] * 2]
    assert measured.figures == {"images": 40, "wanted": 1.0, "mean": pytest.approx(0.4)}


def test_what_is_drawn_instead_is_the_likeliest_label_whatever_the_rank_of_the_concept() -> None:
    """x is second in every image: a hit among the best two, and nothing that was drawn instead; by a threshold both may be true."""
    shares = []
    for rule, instead in (("top-2", "x"), ("top-2", "y"), ("threshold-0.4", "x")):
        gate = Sequential(0.5, "below", 0.05, 1, 40, 200)
        shares.append(measure(Drawn(), ROOT, ASKED, Eyes(), gate, rule=Rule.parse(rule), instead=instead).instead)  # type: ignore[arg-type]
    assert shares == [0.0, 1.0, 1.0]


def test_figures_are_taken_of_the_counted_images_only() -> None:
    """A gate that stops within a look: what lies behind it is in no figure."""

    class Late(Drawn):
        def scores(self, lineage: Lineage, wanted: tuple[ImageSet, Any], detector: Any) -> Tensor:
            return torch.tensor([[0.4, 0.6]] * 4 + [[0.6, 0.4]] * 400)[: len(wanted[0].prompts)]

    gate = Sequential(0.3, "below", 0.05, 1, 20, 200)
    measured = measure(Late(), ROOT, ASKED, Eyes(), gate)  # type: ignore[arg-type]
    assert measured.figures["images"] == measured.rate.n


def test_labels_are_found_whatever_their_case() -> None:
    """MACE writes 'Leonardo Dicaprio' and GCD 'Leonardo DiCaprio': the same place; a name that differs in a letter is none."""
    eyes = SimpleNamespace(labels=("none", "Leonardo DiCaprio", "Adele"))
    assert places(eyes, ["adele", "Leonardo Dicaprio", "none"]).tolist() == [2, 1, 0]
    assert places(SimpleNamespace(labels=("crane", "Crane", "CRANE")), ["Crane", "crane", "CRANE"]).tolist() == [1, 0, 2]
    with pytest.raises(SpecError, match="cannot see 'Leonard Dicaprio'"):
        places(eyes, ["Adele", "Leonard Dicaprio"])


def lab(tmp_path: Path, task: Task) -> Lab:
    """A lab on the pocket model with nothing selected."""
    options: Any = SimpleNamespace(model_of=lambda task: "pocket", candidate=None, applied=lambda each: each, cells=lambda claim, each: [])
    return Lab(options, task, Engine(Store(tmp_path)))


@pytest.fixture
def pocket_task() -> Task:
    """Two people and their anchor out of the pocket task."""
    task = Task.load(Path(__file__).parents[2] / "suites" / "celebrity" / "pocket.toml")
    few = lambda group, count: replace(group, concepts=group.concepts[:count], prompts=group.prompts[:3])  # noqa: E731
    return replace(task, erased=few(task.erased, 2), retained=few(task.retained, 2), anchor=few(task.anchor, 1))


@pytest.mark.slow
def test_a_gallery_recognises_whom_the_base_model_draws(tmp_path: Path, pocket_task: Task) -> None:
    """Enrolled from the pocket model's own pictures, it names at least 9 of 12 new ones rightly and nobody in any of 3 anchor pictures."""
    from harness.measurement import round_images

    task = replace(pocket_task, detector={"name": "gallery", "folder": "pocket", "images": 6, "rule": "top-1"})
    made = lab(tmp_path, task)
    eyes, found, total = made.detector, 0, 0
    for group in (task.erased, task.retained):
        scores = made.engine.scores(made.base, (round_images(group, range(1), 0), task.sampler), eyes)
        wanted = torch.tensor([eyes.labels.index(c) for c in group.concepts for _ in group.prompts])
        found, total = found + int(made.rule.hits(scores, wanted).sum()), total + len(wanted)
    assert total == 12
    assert found >= 9
    anchor = made.engine.scores(made.base, (round_images(task.anchor, range(1), 0), task.sampler), eyes)
    assert (anchor.argmax(1) == eyes.labels.index("none")).all()
    assert "gallery of 90 base images of 5 classes" in eyes.description


def test_a_rule_that_means_nothing_for_the_detector_is_refused(tmp_path: Path, pocket_task: Task) -> None:
    """NudeNet without a threshold, before anything is drawn; with one, it looks."""
    with pytest.raises(SpecError, match="name a threshold"):
        _ = lab(tmp_path, replace(pocket_task, detector={"name": "nudenet"})).detector
    made = lab(tmp_path, replace(pocket_task, detector={"name": "nudenet", "rule": "threshold-0.6"}))
    assert made.detector.labels[0] == "nudity"


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ({"name": "classifier"}, "missing a required argument: 'folder'"),
        ({"name": "clip", "folder": "pocket", "concept": "cat"}, "'clip' takes"),
        ({"name": "clup"}, "Did you mean 'clip'"),
        ({"name": "nudenet", "rule": "most"}, "cannot read the detector's rule 'most'"),
        *(
            ({"name": "nudenet", "rule": "threshold-0.6", "counted": counted}, rf"\[detector\] of task '.+': nudenet's counted must be .*exposed.*, got {said}")
            for counted, said in (([], r"\[\]"), (3, "3"), ([1], r"\[1\]"))
        ),
    ],
)
def test_a_table_that_cannot_be_meant_is_told(detector: dict[str, Any], message: str, tmp_path: Path, pocket_task: Task) -> None:
    """A missing or unknown argument, a name that is not in the folder, a rule that is none, labels of which none would ever count."""
    with pytest.raises(SpecError, match=message):
        _ = lab(tmp_path, replace(pocket_task, detector=detector)).detector
