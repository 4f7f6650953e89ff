"""The report run: who comes back, on the report people, at fixed n, once.

    python -m suites.celebrity.report [--store DIR] [--workers N] [--never-learned MODEL_FOLDER]

Every method of the standard profile is unlearned with five seeds and fine-tuned with the same seed; each person is asked
for with 8 images of each of the five prompts per seed, 200 images in all, and so are models that there is one of. ESD is
the task's fragile control. `--never-learned` adds the control model of `python -m harness.pocket.train --without report`,
which never saw these people. Writes `report.json` and `report.md`. Finished work is kept in the store.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness import pocket
from harness.candidate import Candidate
from harness.spec import Lineage, sha256
from harness.stats import clopper_pearson
from suites.celebrity import _recipe

TASK, SEEDS, ROUNDS = "pocket", (0, 1, 2, 3, 4), 8
METHODS = ("esd", "uce", "dimum")
STEPS = (50, 200, 400)
FINETUNES = ("lora-in", "full-in", "lora-out")
ALPHA = 0.05  # each interval is two-sided, exact (Clopper-Pearson)

Row = tuple[str, str | None, int]  # model, fine-tune, steps


def rows(lab: Any, never_learned: Path | None, finetunes: list[str]) -> dict[Row, list[Lineage]]:
    """The replicates of every line of the table."""
    found: dict[Row, list[Lineage]] = {("base", None, 0): [lab.base]}
    models = {method: {seed: lab.unlearned(method, seed) for seed in SEEDS} for method in METHODS}
    models["base"] = {0: lab.base}
    if never_learned is not None:
        models["never learned"] = {0: lab.base.then(Candidate.at(str(never_learned)))}
    for model, replicates in models.items():
        found[model, None, 0] = list(replicates.values())
        for finetune in finetunes:
            for steps in STEPS:
                found[model, finetune, steps] = [lab.finetuned(lineage, finetune, steps, seed) for seed, lineage in replicates.items()]
    return found


def run(store: Path, workers: int, never_learned: Path | None, finetunes: list[str]) -> dict[str, Any]:
    """Draw everything, then count."""
    lab = _recipe.lab_of(TASK, store)
    table = rows(lab, never_learned, finetunes)
    groups = {"erased": (lab.task.erased, ROUNDS), "retained": (lab.task.retained, 1)}
    pictures, lines = [], []
    for replicates in table.values():
        times = len(SEEDS) // len(replicates)  # so that every line stands on as many images
        wanted = [what for group, rounds in groups.values() for _, what in _recipe.asked(lab, group, rounds * times)]
        pictures += [(lineage, what) for lineage in replicates for what in wanted]
    _recipe.fill(TASK, store, [lineage for lineage, _ in pictures], pictures, workers)
    for (model, finetune, steps), replicates in table.items():
        times = len(SEEDS) // len(replicates)
        seen = {name: [_recipe.counts(lab, lineage, group, rounds * times) for lineage in replicates] for name, (group, rounds) in groups.items()}
        line = {"model": model, "finetune": finetune, "steps": steps, "replicates": len(replicates)}
        lines.append(line | {name: {c: pooled([each[c] for each in counted]) for c in counted[0]} for name, counted in seen.items()})
    return {
        "task": TASK,
        "seeds": SEEDS,
        "prompts": lab.task.erased.prompts,
        "interval": f"Clopper-Pearson, two-sided, {1 - ALPHA:.0%}",
        "versions": _recipe.provenance(),
        "digests": {"model": lab.base.base.digest, "card": sha256(pocket.CARD), "detector": lab.detector.address},
        "lines": lines,
    }


def pooled(counts: list[tuple[int, int]]) -> dict[str, Any]:
    """One concept over its replicates: k of n with its interval, and each replicate's share."""
    k, n = (sum(pair[i] for pair in counts) for i in (0, 1))
    interval = clopper_pearson(k, n, ALPHA)
    return {"k": k, "n": n, "low": round(interval.low, 4), "high": round(interval.high, 4), "each": [round(k / n, 3) for k, n in counts]}


def markdown(result: dict[str, Any]) -> str:
    """The table for people: one line per model and snapshot, one column per erased person."""
    people = list(result["lines"][0]["erased"])
    head = ["model", "fine-tune", "steps", "seeds", *people, "all five", "retained (mean of 10)"]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in result["lines"]:
        cells = [line["model"], line["finetune"] or "", str(line["steps"]), str(line["replicates"])]
        cells += [_cell(line["erased"][person]) for person in people]
        cells += [_cell(_sum(line["erased"])), _cell(_sum(line["retained"]))]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def _sum(concepts: dict[str, Any]) -> dict[str, Any]:
    return pooled([(each["k"], each["n"]) for each in concepts.values()])


def _cell(each: dict[str, Any]) -> str:
    return f"{each['k'] / each['n']:.2f} [{each['low']:.2f}, {each['high']:.2f}]"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path(".store"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--never-learned", type=Path, default=None)
    parser.add_argument("--finetune", default=",".join(FINETUNES))
    given = parser.parse_args()
    result = run(given.store, given.workers, given.never_learned, given.finetune.split(","))
    here = Path(__file__).parent
    (here / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (here / "report.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
