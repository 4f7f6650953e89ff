"""Published findings, held against the pocket model: each is fixed in `findings.toml` before anything is run.

    python -m suites.findings [--store DIR] [--workers N] [--only NAME,NAME]

Writes `findings.json` and `findings.md` beside it, after each finding: the rate of every replicate and concept in both arms (or what was
predicted and measured), the difference (or the rank correlation) with its interval, and one of four words: *reproduced*,
*opposite*, *no effect*, *undecided*. The pocket model exercises the measurement; it does not confirm a paper about Stable
Diffusion, and says so here by failing to differ as well as by differing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from fixtures.options import Cell
from harness.errors import SpecError, unknown
from harness.spec import Group, Lineage
from reports.ranking import correlation
from suites.celebrity import _recipe

HERE = Path(__file__).parent
DIRECTIONS, GROUPS, ARMS = ("above", "equal"), ("erased", "retained"), ("first", "second")
BANNER = "The pocket model exercises the measurement; these words say nothing about Stable Diffusion."
COMMON = ("task", "seeds", "rounds", "margin", "alpha")
Common = dict[str, Any]
Line = dict[str, Any]  # a finding as findings.json holds it


@dataclass(frozen=True)
class Difference:
    """One prediction: the first arm's mean rate exceeds the second's by `margin`, or equals it within `margin`."""

    name: str
    source: str
    direction: str
    first: Cell
    second: Cell
    group: str = "erased"
    alone: bool = False  # in the second arm each concept has a model that erased nothing else

    def measured(self, lab: Any, common: Common, store: Path, workers: int) -> tuple[np.ndarray, Line]:
        """The difference of each replicate and concept (seeds, concepts), and the rates of both arms."""
        group, rounds = getattr(lab.task, self.group), common["rounds"]
        arms = {arm: [_models(lab, getattr(self, arm), group, seed, self.alone and arm == "second") for seed in range(common["seeds"])] for arm in ARMS}
        _draw(lab, common, [models for seeds in arms.values() for models in seeds], group, store, workers)
        rates = {arm: _rates(lab, seeds, group, rounds) for arm, seeds in arms.items()}
        return rates["first"] - rates["second"], {arm: table.tolist() for arm, table in rates.items()}


@dataclass(frozen=True)
class Ranking:
    """One prediction: over a grid of methods and fine-tunes, the diagnosis ranks the cells as the rise of the rate does.

    Of each replicate and concept, Spearman's correlation of the predicted share of the gap and the rise of the rate from the unlearned to the
    fine-tuned model. A cell without a gap has no prediction and is left out; where nothing is left to rank, the correlation counts as 0.
    """

    name: str
    source: str
    direction: str
    methods: tuple[str, ...]
    finetunes: tuple[str, ...]
    steps: int
    group: str = "erased"

    def cells(self, concept: str, seed: int) -> list[Cell]:
        """The grid."""
        return [Cell("", method, finetune, self.steps, concept, seed) for method, finetune in itertools.product(self.methods, self.finetunes)]

    def measured(self, lab: Any, common: Common, store: Path, workers: int) -> tuple[np.ndarray, Line]:
        """The correlation of each replicate and concept (seeds, concepts), and what it is made of (seeds, concepts, cells)."""
        group, seeds = getattr(lab.task, self.group), range(common["seeds"])
        grid = [[self.cells(concept, seed) for concept in group.concepts] for seed in seeds]
        models = {lab.lineage(cell).key: cell for cell in itertools.chain(*itertools.chain(*grid))}
        tuned = [lab.lineage(cell) for cell in models.values()]
        every = {model.key: model for model in itertools.chain.from_iterable((model.parent, model) for model in tuned)}
        _draw(lab, common, [dict.fromkeys(group.concepts, model) for model in every.values()], group, store, workers)
        rates = {key: _rates(lab, [dict.fromkeys(group.concepts, model)], group, common["rounds"])[0] for key, model in every.items()}
        jobs = [[cell for row in rows for cell in row if cell.method == method] for rows in grid for method in self.methods]
        _recipe.share(diagnose, [(common["task"], store, job) for job in jobs], workers)
        predicted = np.array([[[_predicted(lab, cell) for cell in row] for row in rows] for rows in grid])
        rise = np.array([[[_rise(lab, rates, cell, place) for cell in row] for place, row in enumerate(rows)] for rows in grid])
        table = np.array([[_ranked(*pair) for pair in zip(*pairs, strict=True)] for pairs in zip(predicted, rise, strict=True)])
        names = [f"{cell.method}, {cell.finetune}" for cell in grid[0][0]]
        return table, {"cells": names, "predicted": _listed(predicted), "rise": rise.tolist(), "correlations": table.tolist()}


Finding = Difference | Ranking


def read(path: Path = HERE / "findings.toml") -> tuple[Common, list[Finding]]:
    """What all findings share, and the findings. Fewer than five replicates are refused: they are the clusters."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    common = {name: data.pop(name) for name in COMMON}
    if common["seeds"] < 5:
        raise SpecError(f"a finding needs at least 5 seeds, got {common['seeds']}: replicates are the clusters of its interval")
    found: list[Finding] = []
    for name, entry in data.items():
        for kind, allowed in (("direction", DIRECTIONS), ("group", GROUPS)):
            if (value := entry.get(kind, allowed[0])) not in allowed:
                raise unknown(f"{kind} of '{name}'", value, allowed)
        if "methods" in entry:
            found.append(Ranking(name, **{**entry, **{each: tuple(entry[each]) for each in ("methods", "finetunes")}}))
            continue
        arms = {arm: Cell("", e["method"], e.get("finetune"), e["steps"], "", 0, e.get("attack")) for arm in ARMS for e in [entry[arm]]}
        found.append(Difference(name, **{**entry, **arms}))
    return common, found


def asked(path: Path = HERE / "findings.toml") -> dict[str, dict[str, Any]]:
    """What the file says of each finding, with what it says of all."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    common = {name: data.pop(name) for name in COMMON}
    return {name: common | entry for name, entry in data.items()}


def interval(table: np.ndarray, alpha: float) -> tuple[float, float, float]:
    """Mean of a (seeds, concepts) table and its two-sided interval at `alpha`, clustered both ways: the variances over seeds and over concepts add up."""
    if min(table.shape) < 5:
        raise SpecError(f"an interval needs at least 5 seeds and 5 concepts, got {table.shape[0]} and {table.shape[1]}")
    means = [table.mean(axis=axis) for axis in (0, 1)]  # of each concept, of each seed
    error = sum(each.var(ddof=1) / len(each) for each in means) ** 0.5
    mean, half = float(table.mean()), float(student.ppf(1 - alpha / 2, min(table.shape) - 1) * error)
    return mean, mean - half, mean + half


def word(direction: str, low: float, high: float, margin: float) -> str:
    """*reproduced*: the interval lies where the finding says; *opposite*, *no effect*: it lies where the finding does not; *undecided*: neither is shown."""
    if -margin < low and high < margin:
        return "reproduced" if direction == "equal" else "no effect"
    if low > margin:
        return "reproduced" if direction == "above" else "opposite"
    return "opposite" if high < -margin else "undecided"


def decided(f: Finding, common: Common, lab: Any, store: Path, workers: int) -> Line:
    """A finding measured, with its interval and its word."""
    table, seen = f.measured(lab, common, store, workers)
    mean, low, high = interval(table, common["alpha"])
    name = "correlation" if isinstance(f, Ranking) else "difference"
    line = {
        "source": f.source,
        "direction": f.direction,
        name: mean,
        "low": low,
        "high": high,
        "word": word(f.direction, low, high, common["margin"]),
    }
    return line | seen


def run(store: Path, workers: int, only: str | None, folder: Path = HERE) -> None:
    """Make every model of the selected findings, count, decide; each is written as soon as it is known, and others are kept."""
    common, findings = read()
    names = [f.name for f in findings]
    chosen = names if only is None else [name.strip() for name in only.split(",")]
    if strange := [name for name in chosen if name not in names]:
        raise unknown("finding", strange[0], names)
    lab = _recipe.lab_of(common["task"], store)
    for f in findings:
        if f.name in chosen:
            lines = written(folder) | {f.name: {"asked": asked()[f.name]} | decided(f, common, lab, store, workers)}
            write(folder, common, {name: lines[name] for name in names if name in lines})
            print(f"{f.name}: {told(lines[f.name])}", flush=True)


def written(folder: Path) -> dict[str, Line]:
    """The findings that earlier runs wrote, as far as `findings.toml` still asks the same."""
    file = folder / "findings.json"
    lines: dict[str, Line] = json.loads(file.read_text(encoding="utf-8"))["findings"] if file.is_file() else {}
    return {name: line for name, line in lines.items() if line.get("asked") == asked().get(name)}


def write(folder: Path, common: Common, lines: dict[str, Line]) -> None:
    """The numbers for machines and a table for people, each whole or not at all."""
    numbers = {**common, "versions": _recipe.provenance(), "findings": lines}
    for name, text in (("findings.json", json.dumps(numbers, indent=1)), ("findings.md", markdown(lines))):
        draft = folder / f".{name}"
        draft.write_text(text + "\n", encoding="utf-8")
        os.replace(draft, folder / name)


def told(line: Line) -> str:
    """Word, estimate and interval."""
    return f"{line['word']}, {line.get('difference', line.get('correlation')):+.2f} [{line['low']:+.2f}, {line['high']:+.2f}]"


def markdown(lines: dict[str, Line]) -> str:
    """A table of what was run, and the names of what was not."""
    _, findings = read()
    rows = [f"| {f.name} | {f.direction} | {_row(lines[f.name])} | {f.source} |" for f in findings if f.name in lines]
    left = [f.name for f in findings if f.name not in lines]
    head = [
        "# Published findings as predictions about the pocket model",
        "",
        BANNER,
        "",
        "By `python -m suites.findings`; what each asks is in `findings.toml`.",
        "",
    ]
    head += ["| finding | predicted | word | difference or correlation [interval] | means of the arms | source |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *rows, *(["", f"Not run yet: {', '.join(left)}."] if left else [])])


def _row(line: Line) -> str:
    which, _, numbers = told(line).partition(", ")
    means = [f"{np.mean(line[arm]):.2f}" for arm in ARMS if arm in line]
    return f"*{which}* | {numbers} | {', '.join(means) or '-'}"


# --- arms ------------------------------------------------------------------------------------------------------------


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


def _draw(lab: Any, common: Common, arms: Sequence[dict[str, Lineage]], group: Group, store: Path, workers: int) -> None:
    """Make the models and what is looked at of them, as far as the store has it not."""
    pictures = [(model, asked) for models in arms for model, (_, asked) in _each(lab, models, group, common["rounds"])]
    _recipe.fill(common["task"], store, [model for model, _ in pictures], pictures, workers)


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


# --- predictions -----------------------------------------------------------------------------------------------------


def diagnose(task: str, store: Path, cells: Sequence[Cell]) -> None:
    """A worker's job: the diagnoses of one unlearned model, each kept as soon as it is made."""
    from fixtures.diagnosis import diagnoses

    diagnoses(_recipe.lab_of(task, store), cells)


def _predicted(lab: Any, cell: Cell) -> float:
    from fixtures.diagnosis import diagnoses

    return diagnoses(lab, [cell])[0].get("predicted", math.nan)


def _rise(lab: Any, rates: dict[str, np.ndarray], cell: Cell, place: int) -> float:
    """The rate after fine-tuning minus the one before it, of the concept in this place."""
    model = lab.lineage(cell)
    return float(rates[model.key][place] - rates[model.parent.key][place])


def _ranked(predicted: np.ndarray, rise: np.ndarray) -> float:
    there = ~np.isnan(predicted)
    return correlation(predicted[there], rise[there]) or 0.0


def _listed(table: np.ndarray) -> Any:
    """Nested lists, with None where there is no number."""
    return np.where(np.isnan(table), None, table.astype(object)).tolist()


def main() -> None:
    """Run, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=HERE.parent / ".store")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default=None, help="names of findings, separated by commas")
    given = parser.parse_args()
    run(given.store, given.workers, given.only)
    print((HERE / "findings.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
