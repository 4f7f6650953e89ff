"""Figures of what must survive: which images they look at, and that they are computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from harness.errors import SpecError
from harness.measurement import round_images, rounds_ahead
from harness.quality import retained
from harness.quality.features import BACKBONES
from harness.quality.fidelity import fidelity
from harness.spec import Base, Lineage, Quality, Tolerance, key
from harness.unlearning.uce import Method
from tests import tiny
from tests.quality.test_fidelity import images

TASK = replace(tiny.task(), tolerance=Tolerance(floor=12))  # two retained concepts under two prompts: 4 a round
BASE = Lineage(Base("d", ""), TASK)
ASKED = Quality(fid=1.0, count=40, backbone="pocket")


class Engine:
    """Draws noise that depends on prompts, seeds and model; remembers what was kept."""

    def __init__(self) -> None:
        self.drawn: dict[str, Tensor] = {}
        self.kept_as: dict[str, Tensor] = {}
        self.records: list[Mapping[str, Any]] = []

    def images(self, lineage: Lineage, wanted: Any) -> Path:
        """A folder whose name is the address."""
        name = key([lineage.key, wanted])
        self.drawn[name] = torch.cat([images(1, seed % 2**31, share=0.5 if lineage.stages else 1.0) for seed in wanted[0].seeds])
        return Path(name)

    def read_images(self, folder: Path) -> Tensor:
        """What was drawn."""
        return self.drawn[folder.name]

    def kept(self, kind: str, what: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
        """Made once."""
        assert kind == "quality"
        if key(what) not in self.kept_as:
            self.records.append(what)
            self.kept_as[key(what)] = make()
        return self.kept_as[key(what)]


def test_which_images_are_looked_at() -> None:
    """As many of every prompt. The first are those of the retained concepts' rate, image by image and set by set; the reference shares no noise."""
    mine, reference = retained.wanted(TASK, ASKED)
    assert mine[0] == (round_images(TASK.retained, range(rounds_ahead(0, 12, 4)), 0), TASK.sampler)
    judged, against = ([seed for chosen, _ in sets for seed in chosen.seeds] for sets in (mine, reference))
    assert len(set(judged)) == len(set(against)) == 40
    assert not set(judged) & set(against)
    prompts = [prompt for chosen, _ in mine for prompt in chosen.prompts]
    assert {prompts.count(prompt) for prompt in prompts} == {10}
    assert judged == list(round_images(TASK.retained, range(10), 0).seeds)
    assert len(retained.wanted(replace(TASK, tolerance=Tolerance(floor=80)), ASKED)[0]) == 1  # no empty set


def test_figures_are_those_of_the_images_and_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """FID and sFID of the model's images against the base model's; the second time nothing is looked at."""
    engine: Any = Engine()
    unlearned = BASE.then(Method())
    found = list(retained.figures(engine, unlearned, ASKED))
    mine, reference = retained.wanted(TASK, ASKED)
    seen = [torch.cat([engine.read_images(engine.images(whose, each)) for each in sets]) for whose, sets in ((unlearned, mine), (BASE, reference))]
    assert found == fidelity(*seen, retained.SAYS, BACKBONES["pocket"])[:2]
    assert [figure.name for figure in found] == ["FID", "sFID"]
    assert "40 images: the base model's for the same prompts, other noise" in str(found[0])
    monkeypatch.setattr(retained, "fidelity", None)
    assert list(retained.figures(engine, unlearned, ASKED)) == found
    with pytest.raises(TypeError):  # another model's are others
        list(retained.figures(engine, BASE, ASKED))


def pictures(folder: Path, seed: int) -> list[Path]:
    """Twelve PNGs of darker noise, wider than what the model draws."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images(12, seed, size=48, share=0.7)):
        Image.fromarray(image.permute(1, 2, 0)[:40].numpy()).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def test_without_a_folder_the_address_is_what_it_was() -> None:
    """What was measured before there were real images is found again."""
    engine: Any = Engine()
    list(retained.figures(engine, BASE.then(Method()), ASKED))
    mine, reference = retained.wanted(TASK, ASKED)
    places = [[key([whose.key, each]) for each in sets] for whose, sets in ((BASE.then(Method()), mine), (BASE, reference))]
    says = BACKBONES["pocket"].says
    assert engine.records == [{"figures": "FID, sFID", "of": places[0], "reference": places[1], "backbone": says, "weights": "", "version": 2}]


def test_real_images_take_the_place_of_the_base_models(tmp_path: Path) -> None:
    """Of the retained concepts' folders only. The base model's own figure is to the same ones, no reference is drawn, and a figure names folder and number."""
    files = [file for i, concept in enumerate(TASK.retained.concepts) for file in pictures(tmp_path / concept, i)]
    pictures(tmp_path / TASK.erased.concepts[0], 7)
    engine: Any = Engine()
    asked = replace(ASKED, reference=str(tmp_path / "{}"))
    for lineage in (BASE.then(Method()), BASE):
        found = list(retained.figures(engine, lineage, asked))
        seen = torch.cat([engine.read_images(engine.images(lineage, each)) for each in retained.wanted(TASK, asked)[0]])
        expected = fidelity(seen, files, "", BACKBONES["pocket"])[:2]
        assert [(f.name, f.value, f.spread, f.resize) for f in found] == [(f.name, f.value, f.spread, f.resize) for f in expected]
        for part in (f"24 images: real ones in '{asked.reference}'", "; 40 images;", "centre crop"):
            assert part in str(found[0])
    assert len(engine.drawn) == 2 * len(retained.wanted(TASK, asked)[0])
    assert engine.records[0]["reference"] == engine.records[1]["reference"]


def test_the_content_of_real_images_is_their_address(tmp_path: Path) -> None:
    """The same files elsewhere and by other names are the same reference; one other pixel makes another."""
    (first, *_) = pictures(tmp_path / "here" / "a", 0)
    pictures(tmp_path / "here" / "b", 1)
    engine: Any = Engine()

    def measured(folder: Path) -> int:
        list(retained.figures(engine, BASE, replace(ASKED, reference=str(folder))))
        return len(engine.records)

    assert measured(tmp_path / "here") == 1
    moved = (tmp_path / "here").rename(tmp_path / "there")
    first = (moved / "a" / first.name).rename(moved / "b" / "renamed.png")
    assert measured(moved) == 1
    changed = Image.open(first)
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(first)
    assert measured(moved) == 2


def test_real_images_that_are_not_there_are_missed_before_anything_is_drawn(tmp_path: Path) -> None:
    """One concept's folder is empty: the error names it, and nothing was drawn."""
    pictures(tmp_path / TASK.retained.concepts[0], 0)
    engine: Any = Engine()
    with pytest.raises(SpecError, match=f"no PNG or JPEG in '.*{TASK.retained.concepts[1]}'"):
        list(retained.figures(engine, BASE, replace(ASKED, reference=str(tmp_path / "{}"))))
    assert engine.drawn == {}


def test_an_unknown_backbone_is_refused() -> None:
    """With those that there are."""
    with pytest.raises(SpecError, match=r"unknown backbone in .quality.*'pocked'.*Did you mean 'pocket'"):
        list(retained.figures(Engine(), BASE, replace(ASKED, backbone="pocked")))  # type: ignore[arg-type]  # all that is asked of it
