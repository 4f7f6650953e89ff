"""The gate from outside: what the command line answers, with measurements that are scripted."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
SUITE = ROOT / "suites" / "celebrity"

# Stands in for fixtures.claims.measured: what each cell shows is read from script.json, everything else holds.
CONFTEST = f"""
import dataclasses, json, os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import pytest
import fixtures.claims
from harness.errors import PreconditionError

pytest_plugins = ["fixtures.plugin"]
SCRIPT = json.loads(Path(__file__).with_name("script.json").read_text())

@pytest.fixture
def lab():
    return None

def measured(lab, cell, claim):
    says = next((word for part, word in SCRIPT.items() if part in f"{{cell.claim}}:{{cell}}"), "holds")
    if says == "invalid":
        raise PreconditionError("the instruments are not sound")
    if says == "crash":
        raise RuntimeError("the detector fell over")
    if says == "kill":
        os._exit(1)
    rate = dict(k=0, n=40, value=0.0, low=0.0, high=0.08)
    return dataclasses.replace(claim, verdict=says, word=says, reason="", rate=rate, before=rate, base=rate)

fixtures.claims.measured = measured
"""


@pytest.fixture
def gate(pytester: pytest.Pytester):
    """Run the real plugin and the real claims over scripted measurements; gives (exit code, verdict.json or None)."""

    def run(*args: str, script: dict[str, str] | None = None, extra: str = "") -> tuple[int, dict | None, pytest.RunResult]:
        suite = pytester.mkdir("suites") / "celebrity" if not (pytester.path / "suites").exists() else pytester.path / "suites" / "celebrity"
        suite.mkdir(exist_ok=True)
        for source in [*SUITE.glob("pocket*.toml"), SUITE / "test_celebrity.py"]:
            (suite / source.name).write_text(source.read_text())
        (suite / "test_celebrity.py").write_text((SUITE / "test_celebrity.py").read_text() + extra)
        pytester.makeconftest(CONFTEST)
        pytester.makefile(".json", script=json.dumps(script or {}))
        pytester.makepyprojecttoml('[tool.pytest]\nstrict = true\njunit_family = "xunit1"\naddopts = ["--import-mode=importlib"]\n')
        result = pytester.runpytest_subprocess("suites/celebrity", "-p", "no:cacheprovider", "--report", "out", *args, timeout=60)
        verdict = pytester.path / "out" / "verdict.json"
        return result.ret, json.loads(verdict.read_text()) if verdict.exists() else None, result

    return run


def test_a_complete_selection_that_holds_is_green(gate):
    """Exit 0 and `gate: true` need every claim of the standard profile."""
    code, verdict, _ = gate()

    assert (code, verdict["gate"], len(verdict["claims"])) == (0, True, 59)


def test_workers_give_the_same_answer(gate):
    """Under -n 2 the controller gathers every claim."""
    code, verdict, _ = gate("-n", "2")

    assert (code, verdict["gate"], len(verdict["claims"])) == (0, True, 59)


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "workers"])
@pytest.mark.parametrize(("says", "expected"), [("broken", 1), ("inconclusive", 10), ("invalid", 11), ("crash", 11)])
def test_one_bad_cell_decides(gate, workers, says, expected):
    """One cell that does not hold keeps the gate shut, with its own exit code."""
    code, verdict, _ = gate(*workers, script={"uce-lora-in-200-Edric": says})

    assert (expected, expected) == (code, verdict["exit_code"])


def test_a_broken_claim_is_said_before_an_invalid_one(gate):
    """1 comes before 11: a proven finding is not hidden by a measurement that failed elsewhere."""
    code, _, _ = gate(script={"uce-lora-in-200-Edric": "broken", "instruments:Tildeth": "invalid"})

    assert code == 1


@pytest.mark.parametrize(
    "args",
    [
        ["--tau", ".9"],
        ["--alpha", ".2"],
        ["-k", "Tildeth"],
        ["--profile", "smoke"],
        ["--method", "uce"],
        ["--steps", "50"],
        ["--no-control"],
        ["--deselect", "suites/celebrity/test_celebrity.py::test_the_instruments_are_sound"],
        ["suites/celebrity/test_celebrity.py::test_the_person_is_forgotten"],
    ],
    ids=lambda args: "-".join(args).replace("/", "."),
)
def test_a_smaller_question_is_no_gate(gate, args):
    """Whatever leaves something out, or asks more gently, ends in 12 even if all of it holds, and says why."""
    if "::" in args[0]:
        args = ["--deselect", "suites/celebrity/test_celebrity.py::test_the_retained_people_are_still_drawn"]
    code, verdict, _ = gate(*args)

    assert (code, verdict["gate"]) == (12, False)
    assert verdict["deviations"]


def test_more_than_the_standard_is_a_gate(gate):
    """Further fine-tunes, steps and replicates only make the question harder."""
    code, verdict, _ = gate("--finetune", "lora-in,lora-out", "--steps", "50,100,200", "--seeds", "2")

    assert (code, verdict["gate"]) == (0, True)


def test_nothing_selected_is_not_green(gate):
    """An empty selection never exits 0."""
    code, verdict, _ = gate("-k", "nobody_of_that_name")

    assert code != 0
    assert verdict is None


def test_a_skipped_claim_is_missing_evidence(gate):
    """A skip leaves no verdict, and a missing verdict is 11."""
    skipping = "\npytestmark = pytest.mark.skip(reason='later')\n"
    code, verdict, _ = gate(extra=skipping)

    assert code == 11
    assert len(verdict["missing"]) == 59


def test_a_test_that_asserts_nothing_cannot_pass_a_broken_claim(gate):
    """If the body passes although the verdict is not `holds`, the claim is invalid."""
    weak = "\n\n@pytest.mark.claim('forgotten')\ndef test_weak(claim):\n    '''It is fine.'''\n"
    code, verdict, _ = gate("-k", "test_weak", script={"forgotten:esd": "broken"}, extra=weak)

    assert code == 11
    assert {"invalid", "holds"} == {claim["verdict"] for claim in verdict["claims"]}


def test_a_dead_worker_is_missing_evidence(gate):
    """A worker that is killed leaves its test without a verdict: 11, and no hang."""
    code, verdict, _ = gate("-n", "2", script={"uce-lora-in-200-Edric": "kill"})

    assert code == 11
    assert any("uce-lora-in-200-Edric" in id for id in verdict["missing"])


def test_an_error_outside_the_claim_is_not_green(gate):
    """A claim whose teardown fails does not count as measured."""
    breaking = "\n\n@pytest.fixture(autouse=True)\ndef spoils():\n    yield\n    raise RuntimeError('disk gone')\n"
    code, _, _ = gate("-k", "instruments", extra=breaking)

    assert code == 11


def test_junit_tells_a_failure_from_an_error(gate, pytester):
    """JUnit: a broken claim is a <failure>, a broken measurement an <error>, and the numbers are properties."""
    gate("--junitxml", "j.xml", "-n", "2", script={"forgotten:uce-unlearned-Edric": "broken", "instruments:Tildeth": "invalid"})
    cases = {case.get("name"): case for case in ElementTree.parse(pytester.path / "j.xml").iter("testcase")}
    broken = cases["test_the_person_is_forgotten[uce-unlearned-Edric Sallowby]"]
    invalid = cases["test_the_instruments_are_sound[Tildeth Oskeby]"]

    assert (len(broken.findall("failure")), len(broken.findall("error"))) == (1, 0)
    assert (len(invalid.findall("failure")), len(invalid.findall("error"))) == (0, 1)
    assert {"verdict": "broken", "n": "40"}.items() <= {p.get("name"): p.get("value") for p in broken.iter("property")}.items()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--method", "ecd"], "Did you mean 'esd'?"),
        (["--method", "esd:eat=3"], "Did you mean 'eta'?"),
        (["--method", "esd:eta=three"], "must be a number"),
        (["--finetune", "lora-im"], "allowed: in, out"),
        (["--finetune", "lura-in"], "Did you mean 'lora'?"),
        (["--task", "poket"], "Did you mean 'pocket'?"),
        (["--profile", "standart"], "Did you mean 'standard'?"),
        (["--steps", "0"], "whole numbers from 1"),
        (["--tau", "2"], "strictly between 0 and 1"),
        (["--candidate", "nowhere.safetensors"], "does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_word_is_explained(gate, args, says):
    """A wrong option stops the run with a guess or the allowed values, and is never green."""
    code, verdict, result = gate(*args)

    assert code not in (0, 12)
    assert verdict is None
    assert says in result.stdout.str() + result.stderr.str()


def test_a_red_first_run_says_that_it_is_a_finding(gate):
    """The summary of a run that finds resurgence says so, and that it is no crash."""
    _, _, result = gate(script={"stays-forgotten:esd-lora-in-200": "broken"})

    result.stdout.fnmatch_lines(["*This is a finding about the model, not a crash.*"])


def test_the_plugin_is_inert_elsewhere(pytester):
    """Tests without claims keep pytest's own exit codes and leave no report."""
    pytester.makeconftest(CONFTEST)
    pytester.makefile(".json", script="{}")
    pytester.makepyfile("def test_plain(): pass")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--report", "out", timeout=60)

    assert result.ret == 0
    assert not (pytester.path / "out").exists()
