"""The gate from outside: what the command line answers, with measurements that are scripted."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
SUITE = ROOT / "suites" / "celebrity"

# Stands in for fixtures.claims.measured: what each cell shows is read from script.json, everything else holds.
CONFTEST = f"""
import dataclasses, json, os, sys
from pathlib import Path
from types import SimpleNamespace
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
    evidence = dict(holds=3.5, holds_at=3.0, broken=-2.0, broken_at=6.0)
    hits = {{f"a portrait of {{cell.concept}}": "0" * 40}}
    found = dict(rate=rate, before=rate, base=rate, evidence=evidence, hits=hits, lineage=cell.method or "base")
    return dataclasses.replace(claim, verdict=says, word=says, reason="", **found)

def provenance(lab, cell):
    made = dict(base="b" * 32, stages=[dict(version=1, **{{"class": f"harness.unlearning.{{cell.method}}.Method"}})], seconds=[1.5])
    return dict(lineages={{cell.method or "base": made}}, device="a machine")

fixtures.claims.measured = measured
fixtures.claims.provenance = provenance
"""

PROJECT = """
[tool.pytest]
strict = true
junit_family = "xunit1"
junit_logging = "system-out"
addopts = ["--import-mode=importlib"]
"""
ARGS = ("-p", "no:cacheprovider", "--report", "out")
PATIENCE = 120  # seconds until a run counts as hung


def lay(folder: Path, script: dict[str, str] | None = None, extra: str = "") -> None:
    """The real claims over scripted measurements, as a project of its own."""
    suite = folder / "suites" / "celebrity"
    suite.mkdir(parents=True, exist_ok=True)
    for source in SUITE.glob("pocket*.toml"):
        (suite / source.name).write_text(source.read_text())
    (suite / "test_celebrity.py").write_text((SUITE / "test_celebrity.py").read_text() + extra)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "script.json").write_text(json.dumps(script or {}))
    (folder / "pyproject.toml").write_text(PROJECT)


@pytest.fixture
def gate(pytester: pytest.Pytester):
    """Run the real plugin and the real claims over scripted measurements; gives (exit code, verdict.json or None)."""

    def run(*args: str, script: dict[str, str] | None = None, extra: str = "") -> tuple[int, dict | None, pytest.RunResult]:
        lay(pytester.path, script, extra)
        result = pytester.runpytest_subprocess("suites/celebrity", *ARGS, *args, timeout=PATIENCE)
        verdict = pytester.path / "out" / "verdict.json"
        return int(result.ret), json.loads(verdict.read_text()) if verdict.exists() else None, result

    return run


@dataclass(frozen=True)
class Mixed:
    """What a run with every verdict left behind."""

    code: int
    verdict: dict
    junit: Path
    said: str

    @property
    def cases(self) -> dict[str, ElementTree.Element]:
        """JUnit's test cases by name."""
        return {case.get("name"): case for case in ElementTree.parse(self.junit).iter("testcase")}


@pytest.fixture(scope="module", params=[[], ["-n", "2"]], ids=["alone", "workers"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """One run for several questions: UCE did not forget, ESD is unclear in one cell, and one instrument is not sound."""
    folder = tmp_path_factory.mktemp("mixed")
    lay(folder, {"forgotten:uce-unlearned": "broken", "stays-forgotten:esd-lora-in-200-Edric": "inconclusive", "instruments:Juno": "invalid"})
    command = [sys.executable, "-m", "pytest", "suites/celebrity", *ARGS, "--junitxml", "j.xml", *request.param]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return Mixed(done.returncode, json.loads((folder / "out" / "verdict.json").read_text()), folder / "j.xml", done.stdout)


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
    code, verdict, _ = gate("--finetune", "lora-in,lora-out", "--steps", "50,100,200", "--seeds", "2", "--finetune-seeds", "2")

    assert (code, verdict["gate"]) == (0, True)
    asked = {tuple(c["seeds"].items()) for c in verdict["claims"] if c["claim"] == "stays-forgotten"}
    assert asked == {(("unlearn", u), ("finetune", u + t), ("sample", 0)) for u in (0, 1) for t in (0, 1000)}
    assert "12 fine-tuned checkpoints a model (lora-in, lora-out at 50, 100, 200 steps, 2 seeds each), 2 replicate(s)" in verdict["scope"]


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


def test_all_skipped_by_workers_is_missing_evidence(gate):
    """The same under -n 2: pytest alone would exit 0."""
    code, verdict, _ = gate("-n", "2", extra="\npytestmark = pytest.mark.skip(reason='later')\n")

    assert code == 11
    assert len(verdict["missing"]) == 59


def test_a_test_that_asserts_nothing_cannot_pass_a_broken_claim(gate):
    """If the body passes although the verdict is not `holds`, the claim is invalid."""
    weak = "\n\n@pytest.mark.claim('forgotten')\ndef test_weak(claim):\n    '''It is fine.'''\n"
    code, verdict, _ = gate("-k", "test_weak", script={"forgotten:esd": "broken"}, extra=weak)

    assert code == 11
    assert {"invalid", "holds"} == {claim["verdict"] for claim in verdict["claims"]}


def test_a_dead_worker_is_missing_evidence(gate, pytester):
    """A worker that is killed leaves its test without a verdict: 11, no hang, and in JUnit an <error> without numbers."""
    code, verdict, _ = gate("-n", "2", "--junitxml", "j.xml", script={"uce-lora-in-200-Edric": "kill"})
    cases = [c for c in ElementTree.parse(pytester.path / "j.xml").iter("testcase") if c.find("error") is not None]

    assert code == 11
    assert any("uce-lora-in-200-Edric" in id for id in verdict["missing"])
    assert any("uce-lora-in-200-Edric" in case.get("name") and "crashed" in case.find("error").get("message") for case in cases)
    assert all(case.find("properties") is None for case in cases)


def test_an_error_outside_the_claim_is_not_green(gate):
    """A claim whose teardown fails does not count as measured."""
    breaking = "\n\n@pytest.fixture(autouse=True)\ndef spoils():\n    yield\n    raise RuntimeError('disk gone')\n"
    code, _, _ = gate("-k", "instruments", extra=breaking)

    assert code == 11


def test_junit_is_what_jenkins_and_gitlab_parse(mixed: Mixed) -> None:
    """The file obeys the schema kept in tests, has each claim once, and counts what it holds."""
    xmlschema = pytest.importorskip("xmlschema", reason="xmlschema, of the dev extra, checks JUnit against its schema")
    xmlschema.validate(str(mixed.junit), str(Path(__file__).parent / "reports" / "junit.xsd"))
    (suite,) = ElementTree.parse(mixed.junit).getroot()

    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["59", "6", "1", "0"]
    assert len(suite.findall("testcase")) == 59


def test_junit_repeats_the_numbers_where_people_look(mixed: Mixed) -> None:
    """system-out has rate, bounds, e-values and hits by prompt of a passed and of a failed claim; the terminal does not repeat it."""
    for method in ("esd", "uce"):
        out = mixed.cases[f"test_the_person_is_forgotten[{method}-unlearned-Edric Sallowby]"].findtext("system-out")
        assert {"k: 0", "n: 40", "high: 0.08", "log_e.holds: 3.5", "prompt 'a portrait of Edric Sallowby': 0/40"} <= set(out.splitlines())

    assert "Captured stdout claim" not in mixed.said


def test_junit_tells_doubt_from_a_broken_claim_and_both_from_an_error(mixed: Mixed) -> None:
    """A failure's message starts with the word; a broken measurement is an <error>; the suite says whether it was a gate."""
    said = {name: case.find("failure").get("message").partition(":")[0] for name, case in mixed.cases.items() if case.find("failure") is not None}
    errors = [name for name, case in mixed.cases.items() if case.find("error") is not None]
    suite = ElementTree.parse(mixed.junit).find("testsuite/properties")
    doubt = {
        p.get("name"): p.get("value") for p in mixed.cases["test_the_person_stays_forgotten_after_fine_tuning[esd-lora-in-200-Edric Sallowby]"].iter("property")
    }

    assert sorted(said.values()) == ["broken"] * 5 + ["inconclusive"]
    assert errors == ["test_the_instruments_are_sound[Juno Marchetto]"]
    assert {"verdict": "inconclusive", "n": "40"}.items() <= doubt.items()
    assert {p.get("name"): p.get("value") for p in suite} == {"gate": "True", "exit_code": "1"}


def test_the_verdict_obeys_its_schema(mixed: Mixed) -> None:
    """verdict.json is what the published schema says, with versions, lineages, seconds and e-values, under workers too."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema, of the dev extra, checks verdict.json against its schema")
    jsonschema.validate(mixed.verdict, json.loads((ROOT / "reports" / "verdict.schema.json").read_text()))
    measured = [claim for claim in mixed.verdict["claims"] if claim["verdict"] != "invalid"]
    run = mixed.verdict["run"]

    assert (mixed.code, mixed.verdict["exit_code"]) == (1, 1)
    assert {claim["lineage"] for claim in measured} == mixed.verdict["lineages"].keys() == {"base", "esd", "uce", "dimum"}
    assert {claim["evidence"]["holds"] for claim in measured} == {3.5}
    assert all(claim["seconds"] >= 0 for claim in measured)
    assert sum(claim["seconds"] for claim in measured) > 0
    assert run["devices"] == ["a machine"]
    assert {"resurgence", "torch", "python"} <= run["versions"].keys()
    assert run["options"]["seeds"] == 1
    assert run["options"]["methods"] == ["esd", "uce", "dimum"]  # the task's, as nobody named any
    assert run["tasks"]["celebrity/pocket"]["tolerance"]["tau"] == 0.1


def test_a_candidate_leaves_a_statement(gate, pytester):
    """The in-toto statement names the candidate's files and verdict.json by the digests they have."""
    import hashlib

    (pytester.path / "mine.safetensors").write_bytes(b"weights")
    code, verdict, _ = gate("--candidate", "mine.safetensors")
    statement = json.loads((pytester.path / "out" / "statement.json").read_text())

    assert (code, statement["predicate"]["result"]) == (0, "PASSED")
    assert statement["subject"] == [{"name": "mine.safetensors", "digest": {"sha256": hashlib.sha256(b"weights").hexdigest()}}]
    assert statement["predicate"]["configuration"][0]["digest"]["sha256"] == hashlib.sha256((pytester.path / "out" / "verdict.json").read_bytes()).hexdigest()
    assert len(statement["predicate"]["passedTests"]) == len(verdict["claims"]) == 23


OTHER = """

fixtures_claims = __import__("fixtures.claims").claims
fixtures_claims.provenance = lambda lab, cell: {
    "device": "", "lineages": {"x": {"base": "b", "stages": [{"class": "harness.candidate.Candidate", "digest": "other"}], "seconds": []}},
}
"""


def test_a_candidate_that_changed_is_no_gate(gate, pytester):
    """If the files are not those that were measured, nothing may pass on them."""
    (pytester.path / "mine.safetensors").write_bytes(b"weights")
    code, verdict, _ = gate("--candidate", "mine.safetensors", "-k", "instruments", extra=OTHER)

    assert code == 12
    assert verdict["deviations"][1:] == ["the candidate's files changed while they were measured"]


def test_a_killed_run_leaves_no_older_verdict(gate, pytester):
    """Whoever reads the report folder of a run that was killed finds nothing, not the green verdict of last week."""
    assert gate()[0] == 0
    gate(script={"instruments:Tildeth": "kill"})

    assert not (pytester.path / "out" / "verdict.json").exists()
    assert not (pytester.path / "out" / "report.html").exists()


SLOW = """

import time
from fixtures.keys import PROGRESS
from fixtures.progress import writer

@pytest.fixture(autouse=True)
def draws(request):
    writer(request.config.stash[PROGRESS])("Ada: 3/40 = .075 [.01, .2], must stay below .1")
    time.sleep(0.8)
"""


@pytest.mark.parametrize(("environ", "shown"), [({}, True), ({"CI": "true"}, False)], ids=["person", "CI"])
def test_progress_is_drawn_for_a_person_only(pytester, environ, shown):
    """On a terminal the running bound is seen while images are drawn and is gone afterwards; under CI nothing is drawn."""
    lay(pytester.path, extra=SLOW)
    said = on_a_terminal(["-k", "instruments and Tildeth"], pytester.path, environ)

    assert ("3/40 = .075 [.01, .2]" in said) is shown
    assert "NOT A GATE (exit code 12)" in said
    assert said.rindex("NOT A GATE") > said.rfind("3/40")  # nothing is drawn over the summary
    assert "1 passed" in said.rstrip().splitlines()[-1]


def on_a_terminal(args: list[str], folder: Path, environ: dict[str, str]) -> str:
    """What a person sees of pytest in a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pytest", "suites/celebrity", "-p", "no:cacheprovider", "--report", "out", *args]
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "COLUMNS")} | {"TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(command, cwd=folder, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, env=clean | environ)
    os.close(theirs)
    said, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        said += part
        if not part:
            break
    if process.poll() is None and time.monotonic() >= end:
        process.send_signal(signal.SIGKILL)
    process.wait(30)
    os.close(ours)
    return said.decode(errors="replace")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--method", "ecd"], "Did you mean 'esd'?"),
        (["--method", "esd:eat=3"], "Did you mean 'eta'?"),
        (["--method", "esd:eta=three"], "must be a number"),
        (["--finetune", "lora-im"], "allowed: far, in, middle, near, out"),
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
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--report", "out", timeout=PATIENCE)

    assert result.ret == 0
    assert not (pytester.path / "out").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [({"dist": "loadgroup", "plan": False, "jobs": None}, "hangs when a worker dies"), ({"dist": "no", "plan": False, "jobs": "jobs"}, "add --plan")],
    ids=["loadgroup", "jobs"],
)
def test_what_would_hang_or_do_nothing_is_refused(given, says):
    """A way of sharing tests that hangs after a crash, and job files without a plan."""
    from fixtures.plugin import pytest_cmdline_main

    with pytest.raises(pytest.UsageError, match=says):
        pytest_cmdline_main(SimpleNamespace(option=SimpleNamespace(**given)))


def test_a_plan_needs_no_workers():
    """-n is taken back."""
    from fixtures.plugin import pytest_cmdline_main

    option = SimpleNamespace(dist="load", tx=["popen"] * 2, numprocesses=2, plan=True, jobs=None)
    pytest_cmdline_main(SimpleNamespace(option=option))
    assert (option.dist, option.tx, option.numprocesses) == ("no", [], 0)


@pytest.mark.parametrize(("model", "code"), [(("--model", "elsewhere/model"), 4), (("--task", "own.toml"), 4), ((), 12)], ids=["brought", "task", "shipped"])
def test_more_workers_than_gpus_start_no_run_of_a_large_model(gate, pytester, monkeypatch, model, code):
    """Refused in a sentence before any worker starts, whether the command line or the task names it; the model that ships is small enough to share a GPU."""
    (pytester.path / "own.toml").write_text('model = "elsewhere/model"\n' + (SUITE / "pocket.toml").read_text())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found, verdict, result = gate("-n", "2", "--method", "uce", "-k", "Tildeth", *model)
    assert found == code
    assert (verdict is None) == bool(model)
    (result.stderr.fnmatch_lines if model else result.stderr.no_fnmatch_line)("*2 workers, each with the whole model, and 1 GPU (0); start at most -n 1*")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["suites"], ["celebrity", "object"]),
        (["suites/object"], ["object"]),
        (["suites/celebrity/test_celebrity.py::test_a", "suites/object/"], ["celebrity", "object"]),
        (["suites/object", "tests"], []),
        (["."], []),
    ],
)
def test_the_suites_that_a_command_line_names(tmp_path, args, named):
    """All, some, one by its file; none where anything else is named."""
    from fixtures.plugin import _suites

    for name in ("celebrity", "object"):
        (tmp_path / "suites" / name).mkdir(parents=True)
        (tmp_path / "suites" / name / f"test_{name}.py").touch()
    config = SimpleNamespace(rootpath=tmp_path, invocation_params=SimpleNamespace(dir=tmp_path), args=args)
    assert [folder.name for folder in _suites(config)] == named
