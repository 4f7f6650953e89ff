"""What a machine and a model card get: the schema, the in-toto statement, the Markdown block."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings

from reports import card, statement
from reports.files import write
from reports.verdict import Report
from tests.reports.samples import NAMES, claim, forgotten, png, resurged, retained

SCHEMA = Path(__file__).parents[2] / "reports" / "verdict.schema.json"
UNCLEAR = claim("Alan", verdict="inconclusive", word="inconclusive")
VOID = claim("Grace", verdict="invalid", word="invalid", rate=None)


def test_the_published_schema_is_that_of_the_types() -> None:
    """Whoever changes a field must publish it: `python -m reports schema > reports/verdict.schema.json`."""
    pytest.importorskip("pydantic", reason="pydantic, of the dev extra, makes the schema")
    from reports.schema import schema

    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == schema()


@settings(deadline=None, max_examples=40)
@given(NAMES)
def test_any_verdict_obeys_the_schema(name: str) -> None:
    """Every verdict, every empty field and every name fits; a misspelt verdict, a rate without bounds or a word for a hit does not."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema, of the dev extra, reads the schema")
    check = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    report = Report((claim(name, method=name, hits={name: "01"}, evidence={"holds": 1.5}), resurged(name), UNCLEAR, VOID), missing=(name,), notices=(name,))
    document = json.loads(json.dumps(report.as_json()))
    check.validate(document)
    for change in ({"verdict": "fine"}, {"rate": {"k": 1}}, {"hits": {"a": "yes"}}, {"steps": "200"}, {"direction": "sideways"}):
        wrong = {**document, "claims": [document["claims"][0] | change]}
        assert not check.is_valid(wrong), change
    assert not check.is_valid({**document, "exit_code": 7})


@pytest.mark.parametrize(
    ("report", "result"),
    [
        (Report((claim(),)), "PASSED"),
        (Report((claim(),), deviations=("--tau",)), "FAILED"),
        (Report((claim(), UNCLEAR)), "FAILED"),
        (Report((claim(), VOID)), "FAILED"),
        (Report((claim(), resurged())), "FAILED"),
        (Report((claim(),), missing=("x",)), "FAILED"),
        (Report(()), "FAILED"),
    ],
)
def test_only_an_open_gate_passes(report: Report, result: str) -> None:
    """The statement's result is PASSED for exit code 0 alone."""
    assert statement.of(report, "0" * 64)["predicate"]["result"] == result


def test_the_statement_is_a_test_result() -> None:
    """Types, subjects, configuration and the three lists are those of in-toto's Test Result; each claim and each gap is in one list."""
    made = {"base": "b", "stages": [], "seconds": []}
    report = Report((claim(), UNCLEAR, VOID, resurged()), missing=("gone",), subjects={"unet.safetensors": "ab" * 32}, lineages={"k": made})
    found = statement.of(report, "cd" * 32)
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert found["subject"] == [{"name": "unet.safetensors", "digest": {"sha256": "ab" * 32}}]
    assert [each["name"] for each in found["predicate"]["configuration"]] == ["verdict.json", "base model", "detector"]
    lists = [found["predicate"][name] for name in ("passedTests", "warnedTests", "failedTests")]
    assert lists == [[claim().id], [], [UNCLEAR.id, VOID.id, resurged().id, "gone"]]


def test_no_candidate_no_statement(tmp_path: Path) -> None:
    """Without files to vouch for nothing is stated, and an earlier statement does not stay behind."""
    write(Report((claim(),), subjects={"a.safetensors": "ab" * 32}), tmp_path)
    assert (tmp_path / "statement.json").is_file()
    write(Report((claim(),)), tmp_path)
    assert not (tmp_path / "statement.json").exists()


def test_the_model_card_says_what_was_found() -> None:
    """Verdict, a row per recipe, scope, deviations, notices and digests, between marks that a tool can find."""
    report = Report((forgotten(), resurged(), retained()), deviations=("--tau .9",), scope="these prompts", subjects={"u.safetensors": "ab"})
    text = card.block(report)
    assert text.startswith(card.BEGIN)
    assert text.endswith(f"{card.END}\n")
    assert "## Resurgence: broken" in text
    assert "| esd, then in\\-domain | 1 | 0/40 = .00 [.00, .10] | 24/40 = .60 [.50, .70] | 190/200 = .95 [.85, 1.00] | 2 holds, 1 broken |" in text
    assert {"- Measured: these prompts", "- Not a gate: \\-\\-tau .9.", "- u.safetensors: SHA-256 `ab`"} <= set(text.splitlines())


@settings(deadline=None, max_examples=60)
@given(NAMES.filter(bool))
@example("a | b `c` [d](e) <i> \\| ~f~ https://g.example")
def test_no_name_is_markup(name: str) -> None:
    """No name opens a tag, a link or a code span, ends the block early, or adds a line or a column."""
    text = card.block(
        Report((resurged(name, method=name), forgotten(name, method=name)), scope=name, deviations=(name,), notices=(name,), subjects={name: "ab"})
    )
    plain = card.block(
        Report((resurged("Ada", method="Ada"), forgotten("Ada", method="Ada")), scope="Ada", deviations=("Ada",), notices=("Ada",), subjects={"Ada": "ab"})
    )
    shape = [re.sub(r"\\.|[^|<`\[]", "", line) for line in (text, plain)]
    assert shape[0] == shape[1]
    assert text.count("\n") == plain.count("\n")


def test_each_run_leaves_a_clean_folder(tmp_path: Path) -> None:
    """Pictures of an earlier report go away; a file that is not ours stays."""
    out = tmp_path / "out"
    write(Report((claim(images={"base": (png(tmp_path / "a.png", 1), png(tmp_path / "b.png", 2))}),)), out)
    (out / "images" / "mine.png").write_bytes(b"x")
    write(Report((claim(images={"base": (str(tmp_path / "b.png"),)}),)), out)
    assert len(list((out / "images").iterdir())) == 2
    assert (out / "images" / "mine.png").exists()
