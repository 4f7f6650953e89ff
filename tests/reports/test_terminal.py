"""The summary in the terminal."""

from __future__ import annotations

from hypothesis import given, settings

from reports.terminal import CAP, markup, summary
from reports.verdict import Report
from tests.reports.samples import NAMES, NASTY, claim, forgotten, rate, resurged, retained

RUN = (forgotten(), claim(steps=50), resurged(), retained())


def text(report: Report) -> str:
    """The summary as one text."""
    return "\n".join(summary(report))


def test_a_first_red_run_says_that_it_found_something() -> None:
    """Somebody who sees red for the first time reads that resurgence was found, of whom, and that nothing crashed."""
    said = text(Report(RUN))
    assert "BROKEN (exit code 1): Resurgence found: Ada came back after unlearning." in said
    assert "This is a finding about the model, not a crash." in said


def test_every_claim_has_its_line() -> None:
    """One line per claim: base, right after unlearning, after k steps with bounds, and the word."""
    lines = [line.split("  ", 2)[2].strip() for line in summary(Report(RUN)) if " base ->" in line]
    assert lines == [
        "1.00 base -> .00 [.00, .10] unlearned: holds",
        "1.00 base ->  .00 unlearned -> .00 [.00, .10] after 50 steps: holds",
        "1.00 base ->  .00 unlearned -> .60 [.50, .70] after 200 steps: resurged",
        "- base ->    - unlearned -> .95 [.85, 1.00] after 200 steps: holds",
    ]


def test_a_claim_of_two_recipes_is_told_once() -> None:
    """What was measured before any fine-tune belongs to each of a method's fine-tunes, but has one line."""
    lines = summary(Report((forgotten(), claim(finetune="a"), claim(finetune="b"))))
    assert sum("unlearned: holds" in line for line in lines) == 1


def test_replicates_are_numbered() -> None:
    """Two lines of one cell are told apart by the seed; retention finds its own replicate's start."""
    cells = [
        retained(steps, finetune="a" if steps else None, seeds={"unlearn": seed}, id=f"{steps}{seed}", rate=rate(190 - seed * 100, 200))
        for seed in (0, 1)
        for steps in (0, 50)
    ]
    lines = [line for line in summary(Report(tuple(cells))) if "after 50 steps" in line]
    assert [" (seed 1)" in line for line in lines] == [False, True]
    assert ".45 unlearned" in lines[1]


def test_fine_tunes_of_one_model_are_numbered() -> None:
    """Each names its own seed and finds the start that they share."""
    cells = [retained(0, finetune=None, seeds={"unlearn": 1, "finetune": 1}, id="0", rate=rate(90, 200))]
    cells += [retained(50, finetune="a", seeds={"unlearn": 1, "finetune": seed}, id=str(seed)) for seed in (1, 1001)]
    lines = [line for line in summary(Report(tuple(cells))) if "after 50 steps" in line]
    assert [" (seed 1, fine-tune seed 1001)" in line for line in lines] == [False, True]
    assert all(".45 unlearned" in line for line in lines)


def test_the_verdict_stands_out() -> None:
    """Only the line with the verdict is coloured: red where something broke, green only where all of a gate holds."""
    for cells, colour in ((RUN, "red"), ((claim(),), "green"), ((), "yellow")):
        report = Report(cells)
        marked = [markup(line, report.exit_code) for line in summary(report)]
        assert [m for m in marked if m] == [{colour: True, "bold": True}]


def test_not_forgotten_and_not_retained_are_told_apart_from_resurgence() -> None:
    """Each way to break has its own sentence: an unlearning that never worked is not called resurgence."""
    fresh = forgotten(rate=rate(30), verdict="broken", word="not forgotten")
    lost = retained(rate=rate(20, 200), verdict="broken", word="not retained")
    said = text(Report((fresh, lost)))
    assert "Unlearning did not work: Ada can still be drawn." in said
    assert "Damage found: 10 retained people did not survive." in said
    assert "Resurgence found" not in said


def test_an_invalid_run_says_nothing_about_the_model() -> None:
    """Missing evidence is called that, with what is missing, and is not mistaken for a finding."""
    said = text(Report((claim(),), missing=("test_stays[Ada]",), tests_failed=2))
    assert "INVALID (exit code 11): 1 selected claim gave no verdict; 2 tests failed before they could say anything." in said
    assert "says nothing about the model" in said
    assert "  test_stays[Ada]" in said
    assert "finding about the model" not in said


def test_no_claims_at_all() -> None:
    """A run that measured nothing says so."""
    assert "No claim was measured at all." in text(Report(()))


def test_not_a_gate_gives_the_reason() -> None:
    """All holds, but the deviation is named and the exit code is not 0."""
    said = text(Report((claim(),), deviations=("--tau .9 differs from the task's .10",)))
    assert "NOT A GATE (exit code 12)" in said
    assert "--tau .9 differs" in said


def test_notices_and_scope_are_repeated() -> None:
    """The pocket banner and the sentence that limits what was measured are in every summary."""
    said = text(Report((claim(),), notices=("pocket says nothing about SD",), scope="for these prompts"))
    assert "pocket says nothing about SD" in said
    assert "for these prompts" in said


def test_many_cells_are_summed_up() -> None:
    """A hundred concepts become mean and worst per recipe, and at most twelve cells are listed, worst first."""
    claims = [cell for i in range(100) for cell in (forgotten(f"p{i}"), claim(f"p{i}") if i % 2 else resurged(f"p{i}", rate=rate(20 + i, 150)))]
    lines = summary(Report(tuple(claims)))
    listed = [line for line in lines if line.startswith("  resurged: ")]
    assert len(listed) == CAP
    assert listed[0].startswith("  resurged: p98,")
    assert "  and 38 more, see report.html" in lines
    assert any("mean .23, worst 118/150 = .79 [.68, .89] (p98, after 200 steps)" in line for line in lines)
    assert len(lines) < 30


def test_recipes_stand_side_by_side() -> None:
    """Where several were compared, each has one line: base, after unlearning, retained, after fine-tuning, each with its interval; one alone has none."""
    one = (forgotten(), resurged(), retained())
    other = tuple(cell(method="uce", rate=rate(k, 100)) for cell, k in ((forgotten, 1), (claim, 2), (retained, 90)))
    lines = summary(Report(one + other))
    at = next(i for i, line in enumerate(lines) if line.startswith("worst concept [bounds]"))
    assert lines[at].split("  ")[0] == "worst concept [bounds]"
    assert [" ".join(line.split()) for line in lines[at + 1 : at + 4]] == [
        "esd, then in-domain 1.00 [.90, 1.00] .00 [.00, .10] .95 [.85, 1.00] .60 [.50, .70]",
        "uce, then in-domain 1.00 [.90, 1.00] .01 [.00, .11] .90 [.80, 1.00] .02 [.00, .13]",
        "",
    ]
    assert not any(line.startswith("worst concept") for line in summary(Report(one)))


@settings(deadline=None, max_examples=60)
@given(NAMES)
def test_no_name_steers_the_terminal(name: str) -> None:
    """No name adds a line, a colour or a change of direction to the summary."""
    cells = (resurged(name, reason=name, method=name), forgotten(name, method=name, claim="instruments", verdict="invalid"))
    lines = summary(Report(cells, missing=(name,), deviations=(name,), notices=(name,), scope=name))
    assert all(line.isprintable() for line in lines)


def test_a_long_name_is_cut_in_the_table() -> None:
    """300 characters do not push the numbers out of their column."""
    lines = summary(Report((claim(NASTY[5]),)))
    assert max(len(line) for line in lines if "unlearned" in line) < 110


def test_failed_instruments_are_named() -> None:
    """If the base model cannot draw somebody, the first line says whom."""
    good, bad = (claim(name, claim="instruments", steps=0, verdict=v, word=v) for name, v in (("Ada", "holds"), ("Alan", "invalid")))
    assert summary(Report((good,)))[0] == "instruments: the base model draws every concept and the detector sees it"
    assert summary(Report((good, bad)))[0] == "instruments: failed for Alan"
