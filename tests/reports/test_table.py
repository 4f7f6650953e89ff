"""Claims side by side, and the curve drawn from them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from reports import curve, table, words
from tests.reports.samples import claim, forgotten, rate, resurged, retained


def test_the_worst_rate_carries_the_bounds_of_all_cells() -> None:
    """The interval of a reported maximum is about the maximum: a less precise cell widens it upwards."""
    exact, vague = claim("Ada", rate=rate(8, 40, 0.15, 0.3)), claim("Alan", rate=rate(1, 10, 0.01, 0.5))
    found = table.extreme([exact, vague])
    assert found is not None
    assert (found.claim.concept, found.rate["value"], found.rate["low"], found.rate["high"]) == ("Ada", 0.2, 0.15, 0.5)


def test_the_worst_of_what_must_survive_is_the_lowest() -> None:
    """For a claim "above", the worst cell is the smallest rate, and its lower end the smallest of all."""
    found = table.extreme([retained(50, rate=rate(180, 200)), retained(200, rate=rate(160, 200))])
    assert found is not None
    assert (found.claim.steps, found.rate["low"], found.rate["high"]) == (200, pytest.approx(0.7), pytest.approx(0.9))


def test_nothing_measured_has_no_worst() -> None:
    """Without a rate there is no number, rather than a zero."""
    assert table.extreme([claim(rate=None)]) is None


def test_unlearning_belongs_to_each_of_its_fine_tunes() -> None:
    """What was measured before any fine-tune is part of every recipe of that method, and no row of its own."""
    cells = [forgotten(), claim(finetune="a"), claim(finetune="b"), forgotten(method="uce")]
    found = {name: [c.claim for c in same] for name, same in table.recipes(cells).items()}
    assert found == {"esd, then a": ["forgotten", "stays-forgotten"], "esd, then b": ["forgotten", "stays-forgotten"], "uce": ["forgotten"]}


def test_two_tasks_are_not_mixed() -> None:
    """The same method under two tasks gives two rows, named by the task."""
    rows = table.rows([claim(), claim(task="other", rate=rate(40))])
    assert [(row.method, row.back) for row in rows] == [("pocket-10: esd, then in-domain", 0), ("other: esd, then in-domain", 1)]


def test_a_row_compares_forgetting_retention_and_resurgence() -> None:
    """The mean is taken at the last snapshot; the worst looks at all of them, which are named."""
    (row,) = table.rows([forgotten(), claim(steps=50, rate=rate(20)), resurged(rate=rate(10)), resurged("Alan", rate=rate(14)), retained()])
    assert (row.forgot, row.back, row.steps, row.concepts, row.verdict) == (0, 0.3, (50, 200), 2, "broken")
    assert row.back_worst is not None
    assert row.back_worst.claim.steps == 50
    assert row.retained is not None


def test_the_curve_starts_right_after_unlearning() -> None:
    """Step 0 is the rate before the fine-tune, also where only the later claim was selected."""
    assert list(curve.rates([resurged(before=rate(2))]).items()) == [(0, rate(2)), (200, rate(24))]
    assert curve.rates([forgotten(rate=rate(1)), resurged(before=rate(2))])[0] == rate(1)


def test_of_replicates_the_curve_shows_the_worst() -> None:
    """Two seeds of one step give one point: the worse."""
    assert curve.rates([claim(rate=rate(1)), claim(rate=rate(9))])[200] == rate(9)


def test_heights_are_rates() -> None:
    """A rate of 1 lies at the top of the frame, 0 at the bottom, the tolerance and the base between."""
    cells = [forgotten(), resurged(rate=rate(40), base=rate(20))]
    names = table.recipes(cells)
    drawn = curve.of(cells, {name: curve.Style.of(0) for name in names}, names)
    assert drawn is not None
    marks = drawn.lines[0].marks
    assert (marks[0].y, marks[1].y) == (drawn.bottom, drawn.top)
    assert drawn.tolerance == pytest.approx(drawn.bottom - 0.1 * (drawn.bottom - drawn.top))
    assert marks[0].x < marks[1].x


def test_crowded_steps_do_not_overprint() -> None:
    """Labels on the x axis keep their distance, and the last step always has one."""
    cells = [claim(steps=step) for step in (1, 2, 5, 10, 150, 295, 300)]
    names = table.recipes(cells)
    drawn = curve.of(cells, {name: curve.Style.of(0) for name in names}, names)
    assert drawn is not None
    places = [x for x, _ in drawn.ticks]
    assert [step for _, step in drawn.ticks] == [0, 150, 300]
    assert all(right - left >= curve.GAP for left, right in pairwise(places))


def test_thirty_lines_look_different() -> None:
    """Colour and shape together tell thirty lines apart."""
    assert len({curve.Style.of(place) for place in range(30)}) == 30


def test_bounds_are_rounded_outwards() -> None:
    """No rounded bound claims more than was shown."""
    assert words.share(rate(1, 100, 0.0099, 0.0901)) == "1/100 = .01 [.00, .10]"
    assert words.share(None) == "not measured"
