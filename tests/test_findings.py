"""Findings are fixed beforehand, can all be built, and are decided by clustered intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fixtures import stages
from fixtures.lab import presets
from harness.catalogue import Spec
from harness.errors import SpecError
from harness.spec import Task
from suites import findings

COMMON, FINDINGS = findings.read()


def test_what_all_findings_share() -> None:
    """Margin .10, at least 5 seeds and 5 concepts in each group."""
    task = Task.load(findings.HERE / "celebrity" / f"{COMMON['task']}.toml")
    assert (COMMON["margin"], COMMON["alpha"]) == (0.10, 0.05)
    assert COMMON["seeds"] >= 5
    assert {f.group for f in FINDINGS} == {"erased", "retained"}
    assert min(len(getattr(task, f.group).concepts) for f in FINDINGS) >= 5


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda f: f.name)
def test_both_arms_can_be_built_and_differ(finding: findings.Finding) -> None:
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
    (finding,) = [f for f in FINDINGS if f.alone]
    together, apart = (findings._models(lab, finding.first, lab.task.erased, 3, alone) for alone in (False, True))
    assert len({model.key for model in together.values()}) == 1
    assert {name: model.task.erased.concepts for name, model in apart.items()} == {name: (name,) for name in lab.task.erased.concepts}
    assert len({model.key for model in apart.values()}) == len(lab.task.erased.concepts)
    assert all(stage.seed == 3 for model in apart.values() for stage in model.stages)
