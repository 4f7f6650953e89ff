"""The claim on quality: when it holds, when it is broken, when it means nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fixtures import claims
from fixtures.options import Cell
from fixtures.utility import decided
from harness.errors import PreconditionError, SpecError
from harness.quality import retained
from harness.quality._figure import Figure
from harness.spec import BROKEN, HOLDS, INCONCLUSIVE, Claim, Lineage, Numbers, Quality
from harness.stats import Rate
from reports import compare, curve, words
from tests import tiny
from tests.test_attacks import Scene, good
from tests.test_options import parsed

TASK = replace(tiny.task(), quality=Quality(fid=10.0, count=40, backbone="pocket"))
T = 1.8331129  # Student's t, 9 degrees of freedom, one-sided .05


def figure(name: str, value: float, spread: float) -> Figure:
    """A figure with its conditions."""
    return Figure(name, value, "eyes, layer pool", 80, "40 images: ours", 40, "none", spread)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The claim of a model whose FID and jackknife error are given; the base model's are 3 and 1 unless given."""

    def tell(value: float, spread: float, floor: tuple[float, float] = (3.0, 1.0), finetune: str | None = None) -> Claim:
        def figures(engine: Any, lineage: Lineage, asked: Quality) -> Iterator[Figure]:
            assert asked is TASK.quality
            yield figure("FID", *((value, spread) if lineage.stages else floor))
            yield figure("sFID", 77.0, 5.0)

        monkeypatch.setattr(retained, "figures", figures)
        lab = Scene(good)
        lab.task = TASK
        cell = Cell("quality", "esd", finetune, 50 if finetune else 0, "2 retained concepts")
        return claims.measured(lab, cell, claims.blank("id", "FID below {above} after {steps}.", cell, lab.options, TASK))

    return tell


# --- cells ------------------------------------------------------------------------------------------------------------


def test_it_is_asked_of_every_snapshot_where_the_task_asks_it() -> None:
    """One cell per snapshot, with an id of its own beside the claim `retained`; none without [quality]."""
    options = parsed("--method", "esd", "--steps", "50")
    assert [str(cell) for cell in options.cells("quality", TASK)] == ["esd-unlearned-quality-2 retained concepts", "esd-lora-in-50-quality-2 retained concepts"]
    assert options.cells("quality", tiny.task()) == []


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_quality_that_stays_holds(told: Any) -> None:
    """The upper end is below the tolerance. Both figures are printed with all their conditions, the base model's beside."""
    found = told(4.0, 2.0, finetune="lora-in")
    assert (found.verdict, found.word, found.direction, found.tolerance, found.steps) == (HOLDS, HOLDS, "below", 10.0, 50)
    assert found.sentence == "FID below 10.0 after 50."
    assert found.concept == "quality of 2 retained concepts"
    assert found.figures == {"FID": 4.0, "sFID": 77.0}
    assert found.rate == {"k": 0, "n": 40, "value": 4.0, "low": pytest.approx(4 - 2 * T), "high": pytest.approx(4 + 2 * T), "figure": "FID"}
    assert found.base["value"] == 3.0
    for part in ("FID 4 ± 2", "sFID 77 ± 5", "backbone eyes", "80 features", "40 images", "reference: 40 images: ours", "resize: none"):
        assert part in found.reason
    assert found.detector == "FID: eyes, layer pool; none; reference: 40 images: ours"


def test_quality_that_is_gone_is_broken(told: Any) -> None:
    """A destroyed generator: the lower end is above the tolerance. Between the two nothing was shown."""
    assert (told(20.0, 2.0).verdict, told(20.0, 2.0).word) == (BROKEN, "not retained")
    assert (told(9.0, 2.0).verdict, told(11.0, 2.0).verdict) == (INCONCLUSIVE, INCONCLUSIVE)
    assert told(1.0, 2.0).rate["low"] == 0.0


@pytest.mark.parametrize("floor", [(9.0, 1.0), (30.0, 1.0)])
def test_a_tolerance_that_the_base_model_misses_means_nothing(told: Any, floor: tuple[float, float]) -> None:
    """Invalid, whatever the unlearned model does: its own images from other noise are as far away."""
    with pytest.raises(PreconditionError, match=r"not shown to be within 10 of others.*FID .*raise `fid` or `count`"):
        told(1.0, 0.1, floor)


def test_a_task_without_quality_has_no_such_claim() -> None:
    """Nobody can ask."""
    lab = Scene(good)
    cell = Cell("quality", "esd", None, 0, "2 retained concepts")
    with pytest.raises(SpecError, match="asks for no quality"):
        claims.measured(lab, cell, claims.blank("id", "", cell, lab.options, lab.task))


def test_real_images_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the folder, where there is one; a tolerance that the base model misses is said to be to real images."""
    cell = Cell("quality", "esd", None, 0, "2 retained concepts")
    lab, quality = Scene(good), replace(TASK.quality, reference="kept/{}")
    said = [claims.blank("id", "The FID to {like}.", cell, lab.options, replace(TASK, quality=asked)).sentence for asked in (None, TASK.quality, quality)]
    assert said == ["The FID to the base model's own images."] * 2 + ["The FID to the real images in 'kept/{}'."]
    monkeypatch.setattr(retained, "figures", lambda *given: iter([figure("FID", 30.0, 1.0), figure("sFID", 77.0, 5.0)]))
    lab.task = replace(TASK, quality=quality)
    with pytest.raises(PreconditionError, match=r"not shown to be within 10 of real ones \(broken\)"):
        claims.measured(lab, cell, claims.blank("id", "", cell, lab.options, lab.task))


def test_the_word_at_the_tolerance_itself() -> None:
    """As of a rate: the whole interval on one side."""

    def between(low: float, high: float) -> Numbers:
        return {"k": 0, "n": 40, "value": (low + high) / 2, "low": low, "high": high, "figure": "FID"}

    assert [decided(between(*ends), 10.0) for ends in ((1, 10), (10, 11), (10.1, 12), (9, 11))] == [HOLDS, INCONCLUSIVE, BROKEN, INCONCLUSIVE]


# --- reports ----------------------------------------------------------------------------------------------------------


def test_a_figure_is_told_by_its_name_and_never_as_a_share(told: Any) -> None:
    """In the terminal, in a failing test; it is drawn in no curve of rates and has no difference of rates."""
    found = told(20.0, 1.0)
    assert words.share(found.rate) == "FID 20.00 [18.17, 21.83], 40 images"
    assert "measured FID 20.000 [18.167, 21.833] of 40 images" in str(found)
    assert curve.rates([found]) == {}
    plain = {name: value for name, value in Rate.of(0, 40, 0.05).__dict__.items() if name in ("k", "n", "low", "high")} | {"value": 0.0}
    assert curve.rates([replace(found, rate=plain)])
    assert compare.Pair(found, found).rise is None
