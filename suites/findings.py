"""Published findings, held against the pocket model: each is fixed in `findings.toml` before anything is run.

    python -m suites.findings [--store DIR] [--workers N] [--only NAME]

Writes `findings.json` beside it: per finding the rate of every replicate and concept in both arms, the difference with its
interval, and one of three words. The pocket model exercises the measurement; it does not confirm a paper about
Stable Diffusion, and says so here by failing to differ as well as by differing.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from fixtures.options import Cell
from harness.errors import SpecError, unknown
from suites.celebrity import _recipe

HERE = Path(__file__).parent
DIRECTIONS, GROUPS = ("above", "equal"), ("erased", "retained")
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
    """Mean of a (seeds, concepts) table and its bounds at `alpha` each, clustered both ways: the variances over seeds and over concepts add up."""
    if min(differences.shape) < 5:
        raise SpecError(f"an interval needs at least 5 seeds and 5 concepts, got {differences.shape[0]} and {differences.shape[1]}")
    means = [differences.mean(axis=axis) for axis in (0, 1)]  # of each concept, of each seed
    error = sum(each.var(ddof=1) / len(each) for each in means) ** 0.5
    mean, half = float(differences.mean()), float(student.ppf(1 - alpha, min(differences.shape) - 1) * error)
    return mean, mean - half, mean + half


def word(direction: str, low: float, high: float, margin: float) -> str:
    """*confirmed*: the interval lies where the finding says; *contradicted*: it lies elsewhere; *open*: neither is shown."""
    if direction == "above":
        return "confirmed" if low > margin else "contradicted" if high < margin else "open"
    if -margin < low and high < margin:
        return "confirmed"
    return "contradicted" if low > margin or high < -margin else "open"


def run(store: Path, workers: int, only: str | None) -> dict[str, Any]:
    """Make every model of the selected findings, count, decide."""
    common, findings = read()
    if only is not None and only not in [f.name for f in findings]:
        raise unknown("finding", only, [f.name for f in findings])
    findings = [f for f in findings if only in (None, f.name)]
    lab = _recipe.lab_of(common["task"], store)
    arms = {(f.name, arm): [_model(lab, getattr(f, arm), seed) for seed in range(common["seeds"])] for f in findings for arm in ("first", "second")}
    groups = {f.name: getattr(lab.task, f.group) for f in findings}
    pictures = [(model, wanted) for (name, _), models in arms.items() for model in models for _, wanted in _recipe.asked(lab, groups[name], common["rounds"])]
    _recipe.fill(common["task"], store, [model for models in arms.values() for model in models], pictures, workers)
    lines = {}
    for f in findings:
        rates = {arm: _rates(lab, arms[f.name, arm], groups[f.name], common["rounds"]) for arm in ("first", "second")}
        mean, low, high = interval(rates["first"] - rates["second"], common["alpha"])
        line = {"source": f.source, "direction": f.direction, "difference": mean, "low": low, "high": high}
        lines[f.name] = line | {"word": word(f.direction, low, high, common["margin"]), **{arm: table.tolist() for arm, table in rates.items()}}
        print(f"{f.name}: {lines[f.name]['word']}, {mean:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)
    return {**common, "versions": _recipe.provenance(), "findings": lines}


def _model(lab: Any, arm: Cell, seed: int) -> Any:
    parent = lab.unlearned(arm.method, seed)
    return lab.attacked(parent, arm.attack, arm.steps, seed) if arm.attack else lab.finetuned(parent, arm.finetune, arm.steps, seed)


def _rates(lab: Any, models: list[Any], group: Any, rounds: int) -> np.ndarray:
    """Shares of hits (seeds, concepts)."""
    counts = [_recipe.counts(lab, model, group, rounds) for model in models]
    return np.array([[k / n for k, n in each.values()] for each in counts])


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=HERE.parent / ".store")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default=None)
    given = parser.parse_args()
    result = run(given.store, given.workers, given.only)
    (HERE / "findings.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
