"""Published findings, held against the pocket model: each is fixed in `findings.toml` before anything is run.

    python -m suites.findings [--store DIR] [--workers N] [--only NAME]

Writes `findings.json` beside it: per finding the rate of every replicate and concept in both arms, the difference with its
interval, and one of four words: *reproduced*, *opposite*, *no effect*, *undecided*. The pocket model exercises the
measurement; it does not confirm a paper about Stable Diffusion, and says so here by failing to differ as well as by differing.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from fixtures.options import Cell
from harness.errors import SpecError, unknown
from harness.spec import Group, Lineage
from suites.celebrity import _recipe

HERE = Path(__file__).parent
DIRECTIONS, GROUPS = ("above", "equal"), ("erased", "retained")
BANNER = "The pocket model exercises the measurement; these words say nothing about Stable Diffusion."
COMMON = ("task", "seeds", "rounds", "margin", "alpha")


@dataclass(frozen=True)
class Finding:
    """One prediction: the first arm's mean rate exceeds the second's by `margin`, or equals it within `margin`."""

    name: str
    source: str
    direction: str
    first: Cell
    second: Cell
    group: str = "erased"
    alone: bool = False  # in the second arm each concept has a model that erased nothing else


def read(path: Path = HERE / "findings.toml") -> tuple[dict[str, Any], list[Finding]]:
    """What all findings share, and the findings. Fewer than five replicates are refused: they are the clusters."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    common = {name: data.pop(name) for name in COMMON}
    if common["seeds"] < 5:
        raise SpecError(f"a finding needs at least 5 seeds, got {common['seeds']}: replicates are the clusters of its interval")
    found = []
    for name, entry in data.items():
        for kind, allowed in (("direction", DIRECTIONS), ("group", GROUPS)):
            if (value := entry.get(kind, allowed[0])) not in allowed:
                raise unknown(f"{kind} of '{name}'", value, allowed)
        arms = {arm: Cell("", e["method"], e.get("finetune"), e["steps"], "", 0, e.get("attack")) for arm in ("first", "second") for e in [entry[arm]]}
        found.append(Finding(name, **{**entry, **arms}))
    return common, found


def interval(differences: np.ndarray, alpha: float) -> tuple[float, float, float]:
    """Mean of a (seeds, concepts) table and its two-sided interval at `alpha`, clustered both ways: the variances over seeds and over concepts add up."""
    if min(differences.shape) < 5:
        raise SpecError(f"an interval needs at least 5 seeds and 5 concepts, got {differences.shape[0]} and {differences.shape[1]}")
    means = [differences.mean(axis=axis) for axis in (0, 1)]  # of each concept, of each seed
    error = sum(each.var(ddof=1) / len(each) for each in means) ** 0.5
    mean, half = float(differences.mean()), float(student.ppf(1 - alpha / 2, min(differences.shape) - 1) * error)
    return mean, mean - half, mean + half


def word(direction: str, low: float, high: float, margin: float) -> str:
    """*reproduced*: the interval lies where the finding says; *opposite*, *no effect*: it lies where the finding does not; *undecided*: neither is shown."""
    if -margin < low and high < margin:
        return "reproduced" if direction == "equal" else "no effect"
    if low > margin:
        return "reproduced" if direction == "above" else "opposite"
    return "opposite" if high < -margin else "undecided"


def run(store: Path, workers: int, only: str | None) -> dict[str, Any]:
    """Make every model of the selected findings, count, decide."""
    common, findings = read()
    if only is not None and only not in [f.name for f in findings]:
        raise unknown("finding", only, [f.name for f in findings])
    findings = [f for f in findings if only in (None, f.name)]
    lab = _recipe.lab_of(common["task"], store)
    groups = {f.name: getattr(lab.task, f.group) for f in findings}
    arms = {
        (f.name, arm): [_models(lab, getattr(f, arm), groups[f.name], seed, f.alone and arm == "second") for seed in range(common["seeds"])]
        for f in findings
        for arm in ("first", "second")
    }
    wanted = {(f.name, arm): (groups[f.name], common["rounds"]) for f in findings for arm in ("first", "second")}
    pictures = [(model, asked) for place, seeds in arms.items() for models in seeds for model, (_, asked) in _each(lab, models, *wanted[place])]
    _recipe.fill(common["task"], store, [model for model, _ in pictures], pictures, workers)
    lines = {}
    for f in findings:
        rates = {arm: _rates(lab, arms[f.name, arm], *wanted[f.name, arm]) for arm in ("first", "second")}
        mean, low, high = interval(rates["first"] - rates["second"], common["alpha"])
        line = {"source": f.source, "direction": f.direction, "difference": mean, "low": low, "high": high}
        lines[f.name] = line | {"word": word(f.direction, low, high, common["margin"]), **{arm: table.tolist() for arm, table in rates.items()}}
        print(f"{f.name}: {lines[f.name]['word']}, {mean:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)
    return {**common, "versions": _recipe.provenance(), "findings": lines}


def _models(lab: Any, arm: Cell, group: Group, seed: int, alone: bool) -> dict[str, Lineage]:
    """The model in which each concept of the group is looked for: one for all, or one that erased it alone."""
    made = {}
    for concept in group.concepts:
        parent = lab.unlearned(arm.method, seed)
        if alone:
            task = replace(lab.task, erased=replace(lab.task.erased, concepts=(concept,)))
            parent = Lineage(parent.base, task, parent.stages)
        made[concept] = lab.attacked(parent, arm.attack, arm.steps, seed) if arm.attack else lab.finetuned(parent, arm.finetune, arm.steps, seed)
    return made


def _each(lab: Any, models: dict[str, Lineage], group: Group, rounds: int) -> list[tuple[Lineage, Any]]:
    """Each concept's model, and what is drawn with it."""
    return list(zip(models.values(), _recipe.asked(lab, group, rounds), strict=True))


def _rates(lab: Any, seeds: list[dict[str, Lineage]], group: Group, rounds: int) -> np.ndarray:
    """Shares of hits (seeds, concepts)."""
    table = []
    for models in seeds:
        counts = {one.concepts[0]: _recipe.counts(lab, model, one, rounds)[one.concepts[0]] for model, (one, _) in _each(lab, models, group, rounds)}
        table.append([k / n for k, n in counts.values()])
    return np.array(table)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=HERE.parent / ".store")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default=None)
    given = parser.parse_args()
    result = run(given.store, given.workers, given.only)
    file = HERE / "findings.json"
    if given.only is not None and file.is_file():
        result["findings"] = json.loads(file.read_text(encoding="utf-8"))["findings"] | result["findings"]
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(BANNER)


if __name__ == "__main__":
    main()
