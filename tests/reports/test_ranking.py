"""Whether the diagnosis ranked the cells as the measurement did."""

from __future__ import annotations

import pytest

from harness.spec import Claim
from reports import words
from reports.html import page
from reports.ranking import correlation, ranking
from reports.terminal import summary
from reports.verdict import Report
from tests.reports.samples import claim

NUMBERS = {"alignment": 0.2, "alignment_low": 0.1, "alignment_high": 0.3, "carried by up cross-attention": 0.4}


def cells(*pairs: tuple[float, float], concepts: int = 5) -> list[Claim]:
    """Claims with a predicted and a measured rise each."""
    return [claim(f"c{i % concepts}", id=str(i), diagnosis={**NUMBERS, "predicted": p, "measured": m}) for i, (p, m) in enumerate(pairs)]


@pytest.mark.parametrize(("sign", "expected"), [(1, "1.00 over 20 cells, [1.00, 1.00]"), (-1, "-1.00 over 20 cells, [-1.00, -1.00]")])
def test_the_ranks_count_and_nothing_else(sign: int, expected: str) -> None:
    """A monotone relation is 1, however bent; a falling one -1."""
    assert expected in (ranking(cells(*((i, sign * i**3) for i in range(20)))) or "")


def test_the_interval_draws_concepts_again() -> None:
    """Twenty cells of two concepts that disagree are two witnesses: the interval reaches from one to the other."""
    agree, disagree = [(i, i) for i in range(10)], [(i, -i) for i in range(10)]
    said = ranking(cells(*(pair for both in zip(agree, disagree, strict=True) for pair in both), concepts=2))
    assert said is not None
    assert "[-1.00, 1.00], drawing 2 concepts again" in said


def test_equal_rises_are_ties() -> None:
    """.3 - .1 and .2 - 0 rank alike, whatever the last bit says: by hand, ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4."""
    assert 0.3 - 0.1 != 0.2
    assert correlation([1, 2, 3, 4], [0.0, 0.2, 0.3 - 0.1, 0.5]) == pytest.approx(0.9486833)
    assert correlation([1, 2, 3, 4], [0.2, 0.3 - 0.1, 0.2, 0.2]) is None
    assert correlation([1, 2, 3], [1, 2, 3]) is None


def test_what_cannot_be_ranked_is_said() -> None:
    """No diagnosis, no sentence; too few cells, no gap or no differences: the sentence says so."""
    assert ranking([claim()]) is None
    assert "3 cells have a prediction; a rank correlation needs 4" in (ranking(cells((1, 1), (2, 2), (3, 3))) or "")
    assert "nothing to rank" in (ranking(cells(*[(1, i) for i in range(5)])) or "")
    hidden = [claim(str(i), id=str(i), diagnosis={**NUMBERS, "measured": 0.5}) for i in range(5)]
    assert "0 cells have a prediction" in (ranking(hidden) or "")
    assert words.diagnosed(hidden[0]).startswith("no gap in the loss to close, rate rose by .50")


def test_the_orthogonal_term_is_shown_with_its_interval() -> None:
    """Where it was computed."""
    numbers = {**NUMBERS, "predicted": 0.1, "measured": 0.2, "orthogonal": -0.31, "orthogonal_low": -0.4, "orthogonal_high": -0.2}
    assert "; orthogonal term -0.31 [-0.40, -0.20]; carried by" in words.diagnosed(claim(diagnosis=numbers))


def test_losses_along_an_attack_are_shown_and_not_ranked() -> None:
    """They are no prediction: each is named, and there is no sentence about ranks."""
    attacked = claim(diagnosis={"unlearning loss when unlearned": 0.00412, "unlearning loss after 50 steps": 1.5})
    assert words.diagnosed(attacked) == "unlearning loss when unlearned 0.00412, unlearning loss after 50 steps 1.5"
    assert ranking([attacked]) is None


def test_reports_show_it() -> None:
    """In the terminal one line, on the page the sentence and what carried each cell."""
    report = Report(tuple(cells(*((i / 10, i / 20) for i in range(8)))))
    assert any(line.startswith("diagnosis: rank correlation") for line in summary(report))
    shown = page(report, {})
    assert "Diagnosis: rank correlation of predicted and measured rise 1.00 over 8 cells" in shown
    assert ".30 of the gap predicted to close, rate rose by .15; alignment .20 [.10, .30]; carried by up cross-attention .40" in shown
