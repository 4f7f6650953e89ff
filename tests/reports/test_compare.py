"""Two runs side by side: what changed, paired, and what does not bear comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.errors import StoreError
from reports.__main__ import main
from reports.compare import compare, lines, read
from reports.files import write
from reports.verdict import Report
from tests.reports.samples import NASTY, claim, rate, resurged


def documents(before: tuple[Any, ...], after: tuple[Any, ...], **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two verdicts as they come from disk; `more` is about the second run."""
    first, second = (json.loads(json.dumps(each.as_json())) for each in (Report(before), Report(after, **more)))
    return first, second


def said(*args: Any, **more: Any) -> str:
    """The comparison as text."""
    return "\n".join(lines(compare(*documents(*args, **more))))


def test_nothing_changed() -> None:
    """A run compared with itself: every claim is paired, none is listed, and nothing is worse."""
    found = compare(*documents((claim(), resurged("Alan")), (claim(), resurged("Alan"))))
    assert list(lines(found)) == ["2 claims in both: 0 worse, 0 better, 2 with the same verdict"]
    assert not found.worse


def test_a_claim_that_got_worse_is_said_first() -> None:
    """Verdict, rates and the difference with bounds of a claim that broke; another one that got better comes after."""
    text = said((claim(), resurged("Alan")), (resurged(), claim("Alan")))
    assert text.index("got worse:") < text.index("holds -> resurged: stays-forgotten, Ada, esd, then in-domain, after 200 steps: 0/40 = .00")
    assert text.index("Ada") < text.index("got better:") < text.index("resurged -> holds: stays-forgotten, Alan")
    assert "difference +0.60 [+0.2" in text.partition("got better:")[0]
    assert "difference -0.60 [-0.8" in text.partition("got better:")[2]
    assert text.endswith("2 claims in both: 1 worse, 1 better, 0 with the same verdict")


def test_images_are_paired_by_prompt_and_place() -> None:
    """Only images that both runs drew count: the common beginning of each common prompt."""
    first, second = {"a": "0011", "b": "00", "only": "1"}, {"a": "01", "b": "1100", "other": "1"}
    (pair,) = compare(*documents((claim(hits=first),), (resurged(hits=second),))).pairs
    assert pair.images is not None
    assert (pair.images.n, pair.images.returned, pair.images.vanished) == (4, 3, 0)
    assert "of 4 images of the same prompt and noise 3 came back and 0 vanished" in said((claim(hits=first),), (resurged(hits=second),))


def test_replicates_are_not_mixed() -> None:
    """Claims are paired by their seeds, too, and never by their place."""
    before = (claim(seeds={"unlearn": 0}), resurged(seeds={"unlearn": 1}))
    after = (resurged(seeds={"unlearn": 1}), claim(seeds={"unlearn": 0}))
    assert [pair.change for pair in compare(*documents(before, after)).pairs] == [0, 0]


def test_a_rate_that_moved_under_the_same_verdict_is_told() -> None:
    """Broken stays broken, but from a quarter to nearly all: the bounds of the difference exclude 0."""
    text = said((resurged(rate=rate(50, 200)),), (resurged(rate=rate(190, 200)),))
    assert "same verdict, but the rate moved:" in text
    assert "moved" not in said((resurged(rate=rate(50, 200)),), (resurged(rate=rate(54, 200)),))


def test_another_detector_makes_rates_incomparable() -> None:
    """A different detector, tolerance or base model is said beside the numbers."""
    assert "NOT COMPARABLE: another detector, tolerance" in said((claim(),), (resurged(detector="other", tolerance=0.2),))


def test_what_is_gone_is_worse() -> None:
    """A claim that held and is not looked at any more is a loss of evidence; a new one is not."""
    found = compare(*documents((claim(), claim("Alan")), (claim(), claim("Grace"))))
    assert found.worse
    assert "only in the first run:" in "\n".join(lines(found))
    assert not compare(*documents((claim(),), (claim(), claim("Grace")))).worse


def test_the_setting_is_compared() -> None:
    """Versions, options, devices and the candidate's files that differ are listed; the report's folder is not."""
    run = {"versions": {"torch": "3"}, "options": {"tau": 0.2, "report": "elsewhere"}, "devices": ["H100"]}
    text = said((claim(),), (claim(),), run=run, subjects={"unet.safetensors": "cd"})
    assert {"  versions.torch: nothing -> 3", "  options.tau: nothing -> 0.2", "  candidate.unet.safetensors: nothing -> cd"} <= set(text.splitlines())
    assert "elsewhere" not in text


@pytest.mark.parametrize("name", NASTY)
def test_no_name_steers_the_terminal(name: str) -> None:
    """Whatever a concept is called, each line stays one printable line."""
    found = compare(*documents((claim(name),), (resurged(name),), run={"versions": {name: name}}))
    assert all(line.isprintable() for line in lines(found))


def test_the_command_answers_with_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 where nothing is worse, 1 where something is, 2 with a reason where a verdict cannot be read; folders and files both do."""
    write(Report((claim(),)), tmp_path / "a")
    write(Report((resurged(),)), tmp_path / "b")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "a" / "verdict.json")]) == 0
    assert main(["compare", str(tmp_path / "b"), str(tmp_path / "a")]) == 0
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "give a report folder or the file itself" in capsys.readouterr().err


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    """A verdict whose numbers may mean something else is not read as if they did not."""
    (tmp_path / "verdict.json").write_text('{"schema_version": 99, "claims": []}')
    with pytest.raises(StoreError, match="schema version 99"):
        read(tmp_path)
