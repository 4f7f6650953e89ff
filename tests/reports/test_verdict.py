"""What a run amounts to: exit codes, verdict.json, and files that are whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from harness.errors import StoreError
from harness.spec import Claim
from reports import files
from reports.files import write
from reports.verdict import Exit, Report
from tests.reports.samples import NAMES, claim, png, resurged

HOLDS, BROKEN = claim(), resurged()
DOUBT = claim(verdict="inconclusive", word="inconclusive")
INVALID = claim(verdict="invalid", word="invalid", rate=None)


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (Report((HOLDS, HOLDS)), 0),
        (Report((HOLDS, BROKEN)), 1),
        (Report((BROKEN, INVALID, DOUBT), missing=("x",), deviations=("--tau",), tests_failed=1), 1),
        (Report((HOLDS, INVALID)), 11),
        (Report((HOLDS, INVALID, DOUBT), deviations=("--tau",)), 11),
        (Report((HOLDS,), missing=("test_x",)), 11),
        (Report((DOUBT,), missing=("test_x",)), 11),
        (Report((HOLDS,), missing=("test_x",), deviations=("--tau",)), 11),
        (Report((HOLDS,), tests_failed=1), 11),
        (Report((HOLDS,), tests_failed=1, deviations=("--tau",)), 11),
        (Report(()), 11),
        (Report((), deviations=("--tau",)), 11),
        (Report((HOLDS, DOUBT)), 10),
        (Report((HOLDS, DOUBT), deviations=("--tau",)), 10),
        (Report((HOLDS,), deviations=("--tau .9 differs from the task's .10",)), 12),
    ],
)
def test_exit_code_precedence(report: Report, code: int) -> None:
    """Broken comes before missing evidence, that before doubt, that before "not a gate"; 0 needs all to be well."""
    assert report.exit_code == code


def test_only_a_complete_gate_exits_with_zero() -> None:
    """No two conditions share an exit code, and none uses a number that pytest uses for its own troubles."""
    assert len(set(Exit)) == 5
    assert not {2, 3, 4, 5} & {int(code) for code in Exit}


def test_a_deviation_is_no_gate() -> None:
    """The JSON of a deviating run says `gate: false` even where every claim holds."""
    assert Report((HOLDS,), deviations=("--tau",)).as_json()["gate"] is False
    assert Report((HOLDS,)).as_json()["gate"] is True


def test_json_round_trip(tmp_path: Path) -> None:
    """Every field of every claim can be rebuilt from verdict.json; only images change: they move into the report."""
    claims = (claim(figures={"UA": 0.9}), resurged("Alan", images={"base": (png(tmp_path / "a.png"),)}), INVALID)
    write(Report(claims, scope="these prompts", notices=("pocket",), run={"images": 3}), tmp_path / "out")
    data = json.loads((tmp_path / "out/verdict.json").read_text())
    rebuilt = [Claim(**one | {"images": {k: tuple(v) for k, v in one["images"].items()}}) for one in data["claims"]]
    moved = {"base": (data["claims"][1]["images"]["base"][0],)}
    assert rebuilt == [claims[0], resurged("Alan", images=moved), claims[2]]
    assert {k: data[k] for k in ("schema_version", "gate", "exit_code", "scope", "notices", "deviations", "missing", "run")} == {
        "schema_version": 1, "gate": True, "exit_code": 1, "scope": "these prompts", "notices": ["pocket"], "deviations": [], "missing": [],
        "run": {"images": 3},
    }  # fmt: skip


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES)
def test_any_name_survives_json(tmp_path: Path, name: str) -> None:
    """A name comes back from verdict.json exactly as it was, whatever it contains."""
    data = json.loads(json.dumps(Report((claim(name),), missing=(name,)).as_json(), allow_nan=False))
    assert (data["claims"][0]["concept"], data["missing"]) == (name, [name])


def test_what_json_does_not_know_becomes_text() -> None:
    """Paths and versions among the run's options do not stop the report."""
    run = Report((HOLDS,), run={"store": Path("a"), "sizes": (1, 2), "nested": {"x": None}}).as_json()["run"]
    assert run == {"store": "a", "sizes": [1, 2], "nested": {"x": None}}


def test_images_are_copied_once_and_named_by_content(tmp_path: Path) -> None:
    """Linked images lie beside the page under names that only their content decides; equal images are one file."""
    same = png(tmp_path / "a.png", 1), png(tmp_path / "b.png", 1), png(tmp_path / "c.png", 2)
    report = Report((claim(images={"base": same}),))
    write(report, tmp_path / "out")
    names = report.as_json()["claims"][0]["images"]["base"]
    assert names[0] == names[1] != names[2]
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out/images").iterdir()) == sorted(set(names))
    assert (tmp_path / "out" / names[2]).read_bytes() == (tmp_path / "c.png").read_bytes()


def test_a_damaged_copy_is_mended(tmp_path: Path) -> None:
    """An image left truncated by an earlier run is written again, since its name promises its content."""
    report = Report((claim(images={"base": (png(tmp_path / "a.png"),)}),))
    copy = tmp_path / "out" / next(iter(report.pictures().values()))
    write(report, tmp_path / "out")
    copy.write_bytes(b"half")
    write(report, tmp_path / "out")
    assert copy.read_bytes() == (tmp_path / "a.png").read_bytes()


def test_a_vanished_image_leaves_no_verdict(tmp_path: Path) -> None:
    """A linked image that cannot be read is an error, and an earlier green verdict does not outlive it."""
    write(Report((HOLDS,)), tmp_path)
    with pytest.raises(StoreError, match=r"gone\.png"):
        write(Report((claim(images={"base": (str(tmp_path / "gone.png"),)}),)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_rate_that_is_no_number_leaves_no_verdict(tmp_path: Path) -> None:
    """NaN is not JSON: such a report is refused instead of written in a dialect."""
    with pytest.raises(ValueError, match="JSON"):
        write(Report((claim(rate={"k": 0, "n": 0, "value": float("nan"), "low": 0, "high": 1}),)), tmp_path)
    assert not (tmp_path / "verdict.json").exists()


@pytest.mark.parametrize("fails", ["report.html", "verdict.json"])
def test_a_failure_while_writing_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """When the disk gives up, the error is raised, no draft stays behind and there is no verdict to misread."""
    replace = os.replace

    def broken(source: Any, target: Any) -> None:
        if Path(target).name == fails:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write(Report((HOLDS,)), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set([] if fails == "report.html" else ["report.html", "model-card.md"])


def test_a_lone_surrogate_does_not_stop_the_report(tmp_path: Path) -> None:
    """A name that came from undecodable bytes is written, though UTF-8 has no place for it."""
    write(Report((claim("bad \udcff"),)), tmp_path)
    assert json.loads((tmp_path / "verdict.json").read_text())["claims"][0]["concept"] == "bad \udcff"
    assert "bad " in (tmp_path / "report.html").read_text(encoding="utf-8")
