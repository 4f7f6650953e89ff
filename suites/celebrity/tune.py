"""Find presets on the development people: the most retention subject to erased <= .02, at most 20 trials a method.

    python -m suites.celebrity.tune [--store DIR] [--workers N] [--method esd,uce]

Development people and seed 100 only; no report person is drawn. Writes `tune.json` (every trial with its counts) beside
this file and prints the choice, which is then written into `harness/pocket/presets.toml` by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import catalogue
from harness.catalogue import Spec
from harness.errors import PreconditionError
from harness.spec import Group, Lineage
from suites.celebrity import _recipe

SEED = 100
ERASED_AT_MOST = 0.02
SHORT = "batch=8:images_per_prompt=5"
TRIALS = {
    "esd": [
        *(f"esd:lr={lr}:steps={n}" for lr, n in (("1e-4", 100), ("1e-4", 200), ("2e-4", 100), ("3e-4", 50))),
        *(f"esd:prompts=task:lr={lr}:steps={n}" for lr, n in (("1e-4", 100), ("2e-4", 100))),
        *(f"esd:lr={lr}:steps={n}" for lr, n in (("2e-4", 200), ("3e-4", 150), ("3e-4", 200), ("5e-4", 100))),
        *(f"esd:prompts=task:lr={lr}:steps={n}" for lr, n in (("3e-4", 150), ("5e-4", 100))),
    ],
    "uce": [
        *(f"uce:ridge={ridge}:preserve={keep}" for ridge, keep in ((10, 0.1), (30, 0.1), (100, 0.1), (100, 1))),
        *(f"uce:prompts=task:ridge={ridge}:preserve={keep}" for ridge, keep in ((10, 1), (30, 1), (100, 0.1), (100, 1), (300, 1), (1000, 0.1))),
        *(f"uce:prompts=task:ridge={ridge}:preserve={keep}" for ridge, keep in ((2000, 0.1), (3000, 0.1), (2000, 1))),
        *(f"uce:ridge={ridge}:preserve={keep}" for ridge, keep in ((200, 0.1), (300, 0.1))),
    ],
    "dimum": [f"dimum:lr={lr}:steps={n}" for lr, n in (("1e-4", 100), ("1e-4", 150), ("2e-4", 60), ("2e-4", 100))],
    "sdd": [
        f"sdd:batch=8:sampler_steps=6:decay=0.97:corrected=true:lr={lr}:steps={n}"
        for lr, n in (("1e-4", 100), ("2e-4", 100), ("3e-4", 100), ("2e-4", 200), ("2e-4", 120), ("15e-5", 150), ("25e-5", 80))
    ],
    "ca": [
        *(f"ca:{SHORT}:lr={lr}:steps={n}" for lr, n in (("3e-4", 100), ("1e-3", 100))),
        *(f"ca:{SHORT}:lr={lr}:steps={n}" for lr, n in (("4e-4", 100), ("5e-4", 100), ("7e-4", 100), ("3e-4", 200), ("3e-4", 150))),
        *(f"ca:{SHORT}:prior=1:lr={lr}:steps=100" for lr in ("5e-4", "7e-4")),
        *(f"ca:{SHORT}:trains=f:detach_start=false:lr={lr}:steps={n}" for lr, n in (("1e-4", 100), ("2e-4", 100))),
    ],
    "ga": [
        f"ga:{SHORT}:clip=1:lam={lam}:lr={lr}:steps={n}"
        for lam, lr, n in (
            (1, "3e-5", 50), (5, "1e-4", 50), (20, "1e-4", 50), (20, "1e-4", 100), (1, "5e-5", 50), (1, "3e-5", 80), (0.5, "1e-4", 50), (0.3, "1e-4", 100),
            (0.2, "3e-4", 50), (0.1, "3e-4", 100), (1, "3e-5", 65), (0.05, "3e-4", 50), (0.1, "1e-4", 100), (0.03, "3e-4", 100),
            (0.1, "1e-4", 200), (0.2, "1e-4", 100), (0.1, "1e-4", 150),
        )
    ],
    "rece": [
        f"rece:prompts={how}:ridge={ridge}:preserve={keep}:rece_ridge={again}:epochs={n}"
        for how, ridge, keep, again, n in (
            ("name", 100, 0.1, 100, 3), ("name", 30, 0.1, 100, 1), ("task", 100, 1, 100, 3), ("task", 300, 1, 300, 3), ("task", 100, 1, 1000, 1),
            ("name", 300, 0.1, 300, 1), ("name", 300, 0.1, 1000, 1), ("name", 300, 0.1, 3000, 1), ("name", 300, 0.1, 3000, 3),
            ("name", 300, 0.1, 10000, 3), ("name", 500, 0.1, 1000, 1), ("name", 500, 0.1, 3000, 3),
            ("name", 300, 0.1, 10000, 1), ("name", 300, 0.1, 30000, 1), ("name", 500, 0.1, 3000, 1), ("name", 500, 0.1, 10000, 1), ("name", 1000, 0.1, 3000, 1),
            ("name", 1000, 0.1, 10000, 1),
        )
    ],
    "mace": [
        *(f"mace:segmenter=border:lora_steps=0:lam1={lam}:lam2={lam}" for lam in ("1e-4", "1e-2", 1)),
        *(
            f"mace:segmenter=border:lora_steps=50:lora_batch=8:tokens={tokens}:lora_lr={lr}:lam1={lam}:lam2={lam}"
            for tokens, lr, lam in (("phrase", "1e-2", "1e-2"), ("tail", "1e-2", "1e-2"), ("tail", "1e-2", 1), ("tail", "1e-3", 1),
                ("tail", "1e-3", 10), ("tail", "1e-3", 100), ("tail", "1e-4", 10), ("tail", "1e-4", 100), ("tail", "1e-4", 1000), ("phrase", "1e-3", 100),
                ("tail", "1e-3", 30), ("tail", "3e-3", 30), ("tail", "3e-3", 100), ("phrase", "3e-3", 30), ("tail", "1e-4", 30))
        ),
    ],
    "salun": [
        *(f"salun:{SHORT}:alpha=1:lr={lr}:steps={n}" for lr, n in (("1e-4", 100), ("3e-4", 50), ("3e-4", 100), ("5e-4", 100), ("3e-4", 200), ("1e-3", 100))),
        *(f"salun:{SHORT}:alpha=0.3:lr={lr}:steps={n}" for lr, n in (("3e-4", 150), ("5e-4", 100), ("5e-4", 150))),
    ],
    "shs": [
        f"shs:{SHORT}:sparsity={keep}:lam={lam}:lr={lr}:steps={n}"
        for keep, lam, lr, n in ((0.995, 1, "1e-4", 100), (0.995, 1, "3e-4", 100), (0.98, 1, "3e-4", 100),
            (0.9999, 1, "3e-4", 100), (0.9999, 0.3, "3e-4", 200), (0.9995, 0.3, "3e-4", 200), (0.9999, 1, "1e-4", 200), (0.99998, 1, "3e-4", 150),
        )
    ],
    "erasediff": [
        f"erasediff:{SHORT}:{how}:lr={lr}:steps={n}"
        for how, lr, n in (
            ("barrier=gradient:eta=1", "1e-4", 100), ("barrier=gradient:eta=1", "3e-4", 60),
            ("barrier=constant:lam=1", "1e-4", 100), ("barrier=constant:lam=1", "3e-4", 60),
            ("barrier=gradient:eta=2", "3e-4", 60), ("barrier=gradient:eta=1", "3e-4", 100), ("barrier=gradient:eta=1", "2e-4", 150),
            ("barrier=gradient:eta=0.5", "3e-4", 150), ("barrier=gradient:eta=1", "5e-4", 60),
        )
    ],
    "sfron": [
        f"sfron:{SHORT}:forget={how}:alpha_f={forget}:lr={lr}:decay={n}:steps={n}"
        for how, forget, lr, n in (
            ("rl", 1, "1e-4", 100), ("rl", 1, "3e-4", 60), ("adaga", 0.3, "1e-4", 100), ("adaga", 0.1, "3e-4", 60), ("rl", 1, "3e-4", 100),
            ("rl", 1, "3e-4", 200), ("rl", 1, "5e-4", 100), ("rl", 3, "5e-4", 100), ("adaga", 1, "5e-5", 100), ("adaga", 1, "3e-5", 100),
        )
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """What is tried on a suite's development concepts: `rounds` images of every erased and of every retained prompt."""

    folder: Path  # of the suite; `tune.json` goes there
    trials: Mapping[str, Sequence[str]]
    rounds: tuple[int, int]
    task: str = "pocket-development"


def run(grid: Grid, store: Path, workers: int, methods: list[str]) -> dict[str, Any]:
    """Every trial's counts of these methods, and the choice of each."""
    task = str(grid.folder / grid.task)
    lab = _recipe.lab_of(task, store)
    made = {method: {text: catalogue.make("unlearning", Spec.parse(text), lab.presets, seed=SEED) for text in grid.trials[method]} for method in methods}
    lineages = {text: lab.base.then(stage) for stages in made.values() for text, stage in stages.items()}
    groups = tuple(zip((lab.task.erased, lab.task.retained), grid.rounds, strict=True))
    pictures = [(lineage, wanted) for lineage in lineages.values() for group, rounds in groups for _, wanted in _recipe.asked(lab, group, rounds)]
    _recipe.fill(task, store, lineages.values(), pictures, workers)
    trials = {text: trial(lab, lineage, dict(zip(("erased", "retained"), groups, strict=True))) for text, lineage in lineages.items()}
    chosen = {method: choose({text: trials[text] for text in made[method]}) for method in methods}
    return {
        "task": grid.task,
        "seed": SEED,
        "rule": f"most retained subject to erased <= {ERASED_AT_MOST}",
        "chosen": chosen,
        "trials": trials,
        "versions": _recipe.provenance(),
    }


def trial(lab: Any, lineage: Lineage, groups: dict[str, tuple[Group, int]]) -> dict[str, Any]:
    """What was seen of each group, or why the model could not be made."""
    try:
        return {name: total(_recipe.counts(lab, lineage, group, rounds)) for name, (group, rounds) in groups.items()}
    except PreconditionError as error:
        return {"error": str(error)}


def total(counts: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Hits over all concepts, images, share, and the worst concept's share."""
    k, n = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    return {"k": k, "n": n, "rate": round(k / n, 4), "highest": max(k / n for k, n in counts.values())}


def choose(trials: dict[str, dict[str, Any]]) -> str | None:
    """The rule. None where no trial erases enough."""
    able = {text: seen["retained"]["rate"] for text, seen in trials.items() if "error" not in seen and seen["erased"]["rate"] <= ERASED_AT_MOST}
    return max(able, key=lambda text: able[text]) if able else None


def main(grid: Grid, description: str | None) -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path(".store"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--method", default=",".join(grid.trials), help="only these; the others' trials stay as they are")
    parser.add_argument("--first", type=int, help="only the first so many trials of each method")
    given = parser.parse_args()
    file, tried = grid.folder / "tune.json", {method: texts[: given.first] for method, texts in grid.trials.items()}
    result = run(replace(grid, trials=tried), given.store, given.workers, given.method.split(","))
    for text, seen in result["trials"].items():
        if "error" in seen:
            print(f"{text:45s} {seen['error']}")
            continue
        print(f"{text:45s} erased {seen['erased']['rate']:.3f} (worst person {seen['erased']['highest']:.3f})  retained {seen['retained']['rate']:.3f}")
    print("chosen:", json.dumps(result["chosen"], indent=1))
    _recipe.keep(file, result)


if __name__ == "__main__":
    main(Grid(Path(__file__).parent, TRIALS, (4, 1)), __doc__)
