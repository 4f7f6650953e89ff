"""A rule turns probabilities into hits; the task names it, the detector never does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.detection._rule import Rule
from harness.errors import SpecError

SCORES = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.1, 0.6, 0.6]])


@pytest.mark.parametrize(
    ("text", "wanted", "hits"),
    [
        ("top-1", [0, 0, 1], [1, 1, 1]),  # of equals, the first
        ("top-1", [1, 1, 2], [0, 0, 0]),
        ("top-2", [1, 1, 2], [1, 1, 1]),
        ("top-2", [2, 2, 0], [0, 0, 0]),
        ("top-3", [2, 2, 0], [1, 1, 1]),
        ("threshold-0.4", [0, 1, 2], [1, 1, 1]),  # at least, not more than
        ("threshold-0.41", [0, 1, 2], [1, 0, 1]),
        ("threshold-.6", [1, 0, 1], [0, 0, 1]),
    ],
)
def test_hits_by_hand(text: str, wanted: list[int], hits: list[int]) -> None:
    """Rank among the labels, or probability of the wanted one, whatever the others have."""
    assert Rule.parse(text).hits(SCORES, torch.tensor(wanted)).tolist() == hits


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=6), st.integers(0, 3))
def test_top_1_is_the_argmax(rows: list[list[int]], label: int) -> None:
    """Ties and all: the same as comparing with argmax."""
    scores = torch.tensor(rows, dtype=torch.float32)
    assert torch.equal(Rule().hits(scores, torch.full((len(rows),), label)), (scores.argmax(1) == label).int())


@pytest.mark.parametrize("text", ["top-1", "top-10", "threshold-0.6"])
def test_a_rule_prints_as_it_is_written(text: str) -> None:
    """What the verdict says can be put back into a task file."""
    assert str(Rule.parse(text)) == text


@pytest.mark.parametrize("text", ["", "top", "top-0", "top-1.5", "threshold", "threshold-0", "threshold-1", "threshold-1.5", "threshold--1", "Top-1", "best"])
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    """The error shows how a rule is written."""
    with pytest.raises(SpecError, match=r"write top-1, top-3"):
        Rule.parse(text)


def test_ranks_mean_nothing_where_several_labels_are_true() -> None:
    """A detector that says so takes a threshold only."""
    many = SimpleNamespace(exclusive=False)
    assert Rule.parse("threshold-0.6").fits(many).least == 0.6
    with pytest.raises(SpecError, match="name a threshold"):
        Rule().fits(many)
