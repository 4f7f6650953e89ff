"""Does an erased concept appear where nobody asked for it? What a rise over the base model must be before anything is said."""

from __future__ import annotations

import pytest

from fixtures.options import Cell
from harness.errors import PreconditionError
from harness.spec import BROKEN, HOLDS, INCONCLUSIVE, Lineage
from tests.test_attacks import Scene, good, told, with_
from tests.test_options import parsed

CELL = Cell("stays-out", "esd", "lora-in", 4, "x")
GENERIC, OTHERS = ("p", "x"), ("r", "r2", "x")  # prompts for the anchor, prompts for the retained; both looked at for x


class Calm(Scene):
    """A scene whose fine-tune is known to be a fair one."""

    def sensitive(self, cell: Cell) -> None:
        """It is."""


def scene(asked: tuple[str, ...], base: tuple[int, int], after: tuple[int, int]) -> Scene:
    """Everything in order but what this group of prompts shows of x."""

    def change(lineage: Lineage, wanted: tuple[str, ...]) -> tuple[int, int] | None:
        if wanted[-1] != "x":
            return None
        if (wanted[0], wanted[-1]) == (asked[0], "x"):
            return after if lineage.stages else base
        return 0, 400

    return Calm(with_(change))


@pytest.mark.parametrize("asked", [GENERIC, OTHERS], ids=["generic", "others"])
def test_it_is_looked_for_on_both_kinds_of_prompts(asked: tuple[str, ...]) -> None:
    """A rise on either breaks the claim; none on both holds."""
    claim = told(scene(asked, (0, 400), (60, 200)), CELL)
    assert (claim.verdict, claim.word) == (BROKEN, "appears unasked")
    assert claim.concept == "x unasked"  # reports show its images and rates apart from those of prompts for x
    assert claim.reason.startswith(f"on prompts for the {'anchor' if asked is GENERIC else 'retained'}; base model 0/400")
    assert claim.rate is not None
    assert claim.rate["k"] == 60
    assert told(scene(asked, (0, 400), (2, 200)), CELL).verdict == HOLDS


def test_a_rise_is_over_the_base_model() -> None:
    """What the base model shows too is not blamed on the fine-tune: the rate is shown to be above tau, its rise is not."""
    assert told(scene(OTHERS, (0, 400), (44, 200)), CELL).verdict == BROKEN
    assert told(scene(OTHERS, (8, 400), (44, 200)), CELL).verdict == INCONCLUSIVE


def test_it_means_nothing_after_an_unfair_fine_tune() -> None:
    """The same preconditions as for resurgence: a model that was spoilt shows nobody."""

    class Spoilt(Scene):
        """Its fine-tune wrecked the model."""

        def sensitive(self, cell: Cell) -> None:
            """It is not."""
            raise PreconditionError("spoilt")

    with pytest.raises(PreconditionError, match="spoilt"):
        told(Spoilt(good), CELL)


def test_it_is_measured_when_it_is_asked_for() -> None:
    """Not in the standard gate; with --incidental or the full profile one cell per person, fine-tune and step."""
    task = Scene(good).task
    assert parsed().cells("stays-out", task) == []
    assert [str(cell) for cell in parsed("--incidental", "--method", "esd", "--steps", "4").cells("stays-out", task)] == [
        f"esd-lora-in-4-unasked-{concept}" for concept in task.erased.concepts
    ]
    assert parsed("--profile", "full").cells("stays-out", task)
