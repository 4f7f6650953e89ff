"""Findings are fixed beforehand, can all be built, and are decided by clustered intervals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from fixtures import diagnosis, stages
from fixtures.lab import Lab
from fixtures.models import presets
from harness.catalogue import Spec
from harness.engine import Engine
from harness.errors import SpecError
from harness.spec import Task
from harness.store import Store
from suites import findings
from tests import tiny
from tests.test_options import parsed

COMMON, FINDINGS = findings.read()
DIFFERENCES = [f for f in FINDINGS if isinstance(f, findings.Difference)]
RANKINGS = [f for f in FINDINGS if isinstance(f, findings.Ranking)]


def test_what_all_findings_share() -> None:
    """Margin .10, at least 5 seeds and 5 concepts in each group."""
    task = Task.load(findings.HERE / "celebrity" / f"{COMMON['task']}.toml")
    assert (COMMON["margin"], COMMON["alpha"]) == (0.10, 0.05)
    assert COMMON["seeds"] >= 5
    assert {f.group for f in FINDINGS} == {"erased", "retained"}
    assert min(len(getattr(task, f.group).concepts) for f in FINDINGS) >= 5


@pytest.mark.parametrize("finding", DIFFERENCES, ids=lambda f: f.name)
def test_both_arms_can_be_built_and_differ(finding: findings.Difference) -> None:
    """Every method, fine-tune and attack exists with its fields, and the arms are two."""
    task = Task.load(findings.HERE / "celebrity" / f"{COMMON['task']}.toml")
    assert (finding.first == finding.second) == finding.alone
    for arm in (finding.first, finding.second):
        assert stages.unlearning(arm.method, presets("pocket"))
        assert bool(arm.finetune) != bool(arm.attack)
        assert not arm.finetune or Spec.parse(arm.finetune).name.partition("-")[2] in task.finetune
        assert not arm.attack or stages.relearning(arm.attack, presets("pocket"), arm.steps).steps == arm.steps


@pytest.mark.parametrize(
    ("direction", "low", "high", "expected"),
    [
        ("above", 0.11, 0.5, "reproduced"),
        ("above", 0.05, 0.5, "undecided"),
        ("above", -0.09, 0.09, "no effect"),
        ("above", -0.3, 0.05, "undecided"),
        ("above", -0.5, -0.11, "opposite"),
        ("equal", -0.09, 0.09, "reproduced"),
        ("equal", -0.09, 0.11, "undecided"),
        ("equal", 0.11, 0.5, "opposite"),
        ("equal", -0.5, -0.11, "opposite"),
    ],
)
def test_the_word_follows_from_the_interval(direction: str, low: float, high: float, expected: str) -> None:
    """Margin .10."""
    assert findings.word(direction, low, high, 0.10) == expected


def test_the_interval_is_clustered_both_ways() -> None:
    """Five concepts that differ and seeds that do not: only the concepts' spread counts, and images do not shrink it. By hand: mean 0, sd of the
    concepts' means sqrt(.025), standard error sqrt(.005), t(.975, 4) = 2.7764.
    """
    table = np.tile([-0.2, -0.1, 0.0, 0.1, 0.2], (9, 1))
    half = 2.776445 * 0.005**0.5
    assert findings.interval(table, 0.05) == pytest.approx((0, -half, half), abs=1e-6)
    assert findings.interval(table.T, 0.05) == pytest.approx((0, -half, half), abs=1e-6)


def test_intervals_cover() -> None:
    """With effects of seeds and of concepts, a two-sided error of 5 % is not exceeded: 2000 tables."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(2000):
        table = rng.normal(0, 0.1, (5, 1)) + rng.normal(0, 0.1, (1, 5)) + rng.normal(0, 0.05, (5, 5))
        _, low, high = findings.interval(table, 0.05)
        missed += not low <= 0 <= high
    assert 0 < missed / 2000 <= 0.05


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("seeds = 4", "at least 5 seeds, got 4"), ('direction = "abov"', "unknown direction.*Did you mean 'above'"), ('group = "x"', "unknown group")],
)
def test_a_finding_that_cannot_be_decided_is_refused(wrong: str, message: str, tmp_path: Path) -> None:
    """Too few clusters, an unknown direction or group."""
    text = (findings.HERE / "findings.toml").read_text(encoding="utf-8")
    key = wrong.partition(" = ")[0]
    lines = [wrong if line.startswith(f"{key} =") else line for line in text.splitlines()]
    (tmp_path / "f.toml").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(SpecError, match=message):
        findings.read(tmp_path / "f.toml")
    with pytest.raises(SpecError, match="at least 5 seeds and 5 concepts"):
        findings.interval(np.zeros((5, 4)), 0.05)


def test_alone_means_a_model_for_each_concept(tmp_path: Path) -> None:
    """The second arm's models erased one concept each, the one that is looked for; the first arm's model erased all."""
    lab = findings._recipe.lab_of("pocket", tmp_path)
    (finding,) = [f for f in DIFFERENCES if f.alone]
    together, apart = (findings._models(lab, finding.first, lab.task.erased, 3, alone) for alone in (False, True))
    assert len({model.key for model in together.values()}) == 1
    assert {name: model.task.erased.concepts for name, model in apart.items()} == {name: (name,) for name in lab.task.erased.concepts}
    assert len({model.key for model in apart.values()}) == len(lab.task.erased.concepts)
    assert all(stage.seed == 3 for model in apart.values() for stage in model.stages)


# --- ranking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finding", RANKINGS, ids=lambda f: f.name)
def test_every_cell_of_a_ranking_can_be_built(finding: findings.Ranking) -> None:
    """Each method and fine-tune exists; the grid is their product, of one concept and replicate, enough to be ranked."""
    task = Task.load(findings.HERE / "celebrity" / f"{COMMON['task']}.toml")
    cells = finding.cells("x", 3)
    assert len(set(cells)) == len(finding.methods) * len(finding.finetunes) >= 4
    assert {(c.concept, c.seed, c.steps) for c in cells} == {("x", 3, finding.steps)}
    for cell in cells:
        assert stages.unlearning(cell.method, presets("pocket"))
        assert Spec.parse(cell.finetune or "").name.partition("-")[2] in task.finetune


class Eyes:
    """Sees the first concept in a bright image, the second in a colourful one."""

    labels, none, address, description = ("x", "y"), None, "eyes", "eyes"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities (n, 2)."""
        x = (images.mean((1, 2, 3)) * 997) % 1
        return torch.stack([x, 1 - x], 1)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a tiny random model; workers are this process."""
    monkeypatch.setattr(diagnosis, "COUNT", 2)
    made = Lab(parsed("--model", str(tiny.save(tmp_path / "model"))), tiny.task(), Engine(Store(tmp_path / "store")))
    made.__dict__["detector"] = Eyes()
    monkeypatch.setattr(findings._recipe, "lab_of", lambda task, store: made)
    monkeypatch.setattr(findings._recipe, "share", lambda work, jobs, workers: [work(*job) for job in jobs])
    return made


SMALL = "batch=1:images_per_prompt=1"
RANKING = findings.Ranking("r", "", "above", (f"ga:steps=1:lr=0.01:{SMALL}", f"ga:steps=2:lr=0.01:{SMALL}"), (f"full-in:{SMALL}", f"full-out:{SMALL}"), 1)


def test_a_ranking_is_measured_and_goes_on_where_it_ended(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicates, two concepts, four cells: what is told of each is Spearman's correlation of what is listed, and the rises are those of the counts.
    An unlearned model's gradients are computed once (2 concepts, 2 fine-tunes, the retained: 5 sets), and by the workers alone. Asked
    again, no model is run.
    """
    common, done, true = {**COMMON, "seeds": 2, "rounds": 2}, list[int](), diagnosis.gradients
    monkeypatch.setattr(diagnosis, "gradients", lambda *given: done.append(1) or true(*given))
    table, line = RANKING.measured(lab, common, tmp_path, 1)
    assert len(done) == 2 * 2 * 5
    assert line["cells"] == [f"{method}, {finetune}" for method in RANKING.methods for finetune in RANKING.finetunes]
    for seed in range(2):
        for place, concept in enumerate(("x", "y")):
            predicted, rise = line["predicted"][seed][place], line["rise"][seed][place]
            there = [i for i, value in enumerate(predicted) if value is not None]
            told = diagnosis.diagnoses(lab, RANKING.cells(concept, seed))
            assert [each.get("predicted") for each in told] == predicted
            ranked = len({round(rise[i], 9) for i in there}) > 1 and len(there) == 4
            expected = spearmanr([predicted[i] for i in there], [round(rise[i], 9) for i in there]).statistic if ranked else 0
            assert table[seed, place] == pytest.approx(expected)
            group = tiny.Group((concept,), lab.task.erased.prompts)
            for cell, risen in zip(RANKING.cells(concept, seed), rise, strict=True):
                after, before = (findings._recipe.counts(lab, model, group, 2)[concept] for model in (lab.lineage(cell), lab.parent(cell)))
                assert risen == pytest.approx(after[0] / after[1] - before[0] / before[1])
    passes = lab.engine.cost()["unet_passes"]
    again, told_again = RANKING.measured(lab, common, tmp_path, 1)
    assert (again == table).all()
    assert told_again == line
    assert lab.engine.cost()["unet_passes"] == passes


def test_a_prediction_that_orders_the_cells_is_reproduced(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rise follows the prediction in every replicate and concept the word is *reproduced*, where it runs against it *opposite*; cells
    without a prediction are left out, and where all are, the correlation is 0 and the word *no effect*.
    """
    common, group = {**COMMON, "seeds": 5}, tuple("abcde")
    lab.task = type("Task", (), {"erased": lab.task.erased.__class__(group, ("the {}",))})
    monkeypatch.setattr(findings, "_draw", lambda *given: None)
    monkeypatch.setattr(findings, "_rates", lambda lab, seeds, group, rounds: np.zeros((1, 5)))
    monkeypatch.setattr(findings, "diagnose", lambda *given: None)
    order = {each: place for place, each in enumerate(RANKING.cells("", 0))}
    place = lambda cell: order[findings.replace(cell, concept="", seed=0)]  # noqa: E731
    wide = findings.replace(RANKING, finetunes=("full-in", "full-out", "lora-in"))
    order.update({each: place for place, each in enumerate(wide.cells("", 0))})
    for predict, rise, expected in (
        (lambda c: place(c) ** 3, place, "reproduced"),
        (lambda c: -place(c), place, "opposite"),
        (lambda c: float("nan") if place(c) == 5 else place(c), lambda c: -9 if place(c) == 5 else place(c), "reproduced"),
        (lambda c: float("nan"), place, "no effect"),
        (place, lambda c: 0.5, "no effect"),
    ):
        monkeypatch.setattr(findings, "_predicted", lambda lab, cell, predict=predict: predict(cell))
        monkeypatch.setattr(findings, "_rise", lambda lab, rates, cell, place, rise=rise: rise(cell))
        line = findings.decided(wide, common, lab, tmp_path, 1)
        assert line["word"] == expected
        assert np.shape(line["correlations"]) == (5, 5)
        json.dumps(line, allow_nan=False)


def test_jobs_are_shared_by_processes_and_a_killed_one_is_no_end(tmp_path: Path) -> None:
    """Each job is done once, whatever the number of workers; an error is raised; a worker that dies says that the command can be run again."""
    findings._recipe.share(os.mkdir, [(str(tmp_path / name),) for name in "abc"], 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    with pytest.raises(FileExistsError):
        findings._recipe.share(os.mkdir, [(str(tmp_path / "a"),)], 1)
    with pytest.raises(SystemExit, match="a worker was killed; run the same command again"):
        findings._recipe.share(os._exit, [(9,)], 1)


# --- what is written -------------------------------------------------------------------------------------------------

LINE = {"source": "s", "direction": "above", "difference": 0.6, "low": 0.4, "high": 0.8, "word": "reproduced", "first": [[0.9]], "second": [[0.3]]}


def test_a_killed_run_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two findings by name, killed at the second: the first is written. Another run adds to it; a finding that is asked no longer goes."""
    first, second, third = (f.name for f in FINDINGS[:3])
    monkeypatch.setattr(findings._recipe, "lab_of", lambda task, store: None)

    def killed(f: findings.Finding, *given: Any) -> dict[str, Any]:
        if f.name == second:
            raise KeyboardInterrupt
        return LINE

    monkeypatch.setattr(findings, "decided", killed)
    with pytest.raises(KeyboardInterrupt):
        findings.run(tmp_path, 1, f"{second}, {first}", tmp_path)
    file = tmp_path / "findings.json"
    assert list(json.loads(file.read_text(encoding="utf-8"))["findings"]) == [first]
    data = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**data, "findings": {"of-old": LINE, **data["findings"]}}), encoding="utf-8")
    findings.run(tmp_path, 1, third, tmp_path)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["findings"] == {name: {"asked": findings.asked()[name], **LINE} for name in (first, third)}
    assert found["margin"] == COMMON["margin"]
    table = (tmp_path / "findings.md").read_text(encoding="utf-8")
    assert findings.BANNER in table
    assert f"| {third} | equal | *reproduced* | +0.60 [+0.40, +0.80] | 0.90, 0.30 |" in table
    assert f"Not run yet: {second}, " in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["findings.json", "findings.md"]


def test_a_ranking_has_its_row() -> None:
    """The correlation stands where a difference would, and there are no arms."""
    (name,) = [f.name for f in RANKINGS]
    line = {**LINE, "correlation": -0.25, "low": -0.4, "high": -0.1, "word": "undecided"}
    for arm in (*findings.ARMS, "difference"):
        del line[arm]
    assert f"| {name} | above | *undecided* | -0.25 [-0.40, -0.10] | - |" in findings.markdown({name: line})


@pytest.mark.parametrize("written", ["in-domain-brings-back-mor", "lora-and-full-are-alike,,", ""])
def test_a_name_that_is_no_finding_is_refused_before_any_work(written: str, tmp_path: Path) -> None:
    """Also between commas."""
    with pytest.raises(SpecError, match="unknown finding"):
        findings.run(tmp_path, 1, written, tmp_path)


def test_the_committed_table_is_that_of_the_numbers() -> None:
    """`findings.md` says what `findings.json` says."""
    lines = json.loads((findings.HERE / "findings.json").read_text(encoding="utf-8"))["findings"]
    assert (findings.HERE / "findings.md").read_text(encoding="utf-8") == findings.markdown(lines) + "\n"


def test_a_line_whose_question_changed_is_run_again(tmp_path: Path) -> None:
    """Numbers are kept for the question that they answer; another number of steps is another question."""
    lines = findings.written(findings.HERE)
    name = next(iter(lines))
    lines[name] = {**lines[name], "asked": {**lines[name]["asked"], "rounds": 1}}
    (tmp_path / "findings.json").write_text(json.dumps({"findings": lines}), encoding="utf-8")
    assert findings.written(tmp_path).keys() == lines.keys() - {name}
