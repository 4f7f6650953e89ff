"""Find presets on the development people: the most retention subject to erased <= .02, at most 20 trials a method.

    python -m suites.celebrity.tune [--store DIR] [--workers N]

Development people and seed 100 only; no report person is drawn. Writes `tune.json` (every trial with its counts) beside
this file and prints the choice, which is then written into `harness/pocket/presets.toml` by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness import catalogue
from harness.catalogue import Spec
from suites.celebrity import _recipe

TASK, SEED, ROUNDS = "pocket-development", 100, 4
ERASED_AT_MOST = 0.02
TRIALS = {
    "esd": [f"esd:lr={lr}:steps={n}" for lr, n in (("1e-4", 100), ("1e-4", 200), ("2e-4", 100), ("3e-4", 50), ("2e-4", 200), ("3e-4", 150))],
    "uce": [
        *(f"uce:ridge={ridge}:preserve={keep}" for ridge in (1, 10, 100) for keep in (0.1, 1)),
        *(f"uce:tokens=last:ridge={ridge}:preserve={keep}" for ridge, keep in ((1, 0.1), (10, 0.1), (1, 1), (0.1, 1))),
    ],
    "dimum": [f"dimum:lr={lr}:steps={n}" for lr, n in (("1e-4", 100), ("3e-4", 100), ("3e-4", 200), ("1e-4", 150), ("1e-4", 200))],
}


def run(store: Path, workers: int) -> dict[str, Any]:
    """Every trial's counts, and the choice of each method."""
    lab = _recipe.lab_of(TASK, store)
    lineages = {text: lab.base.then(catalogue.make("unlearning", Spec.parse(text), lab.presets, seed=SEED)) for texts in TRIALS.values() for text in texts}
    groups = ((lab.task.erased, ROUNDS), (lab.task.retained, 1))
    pictures = [(lineage, wanted) for lineage in lineages.values() for group, rounds in groups for _, wanted in _recipe.asked(lab, group, rounds)]
    _recipe.fill(TASK, store, lineages.values(), pictures, workers)
    trials = {
        text: {name: total(_recipe.counts(lab, lineage, group, rounds)) for name, (group, rounds) in zip(("erased", "retained"), groups, strict=True)}
        for text, lineage in lineages.items()
    }
    chosen = {method: choose({text: trials[text] for text in texts}) for method, texts in TRIALS.items()}
    return {
        "task": TASK,
        "seed": SEED,
        "rule": f"most retained subject to erased <= {ERASED_AT_MOST}",
        "chosen": chosen,
        "trials": trials,
        "versions": _recipe.provenance(),
    }


def total(counts: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Hits over all concepts, images, share, and the worst concept's share."""
    k, n = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    return {"k": k, "n": n, "rate": round(k / n, 4), "highest": max(k / n for k, n in counts.values())}


def choose(trials: dict[str, dict[str, dict[str, float]]]) -> str | None:
    """The rule. None where no trial erases enough."""
    able = {text: seen["retained"]["rate"] for text, seen in trials.items() if seen["erased"]["rate"] <= ERASED_AT_MOST}
    return max(able, key=lambda text: able[text]) if able else None


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path(".store"))
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    result = run(given.store, given.workers)
    for text, seen in result["trials"].items():
        print(f"{text:45s} erased {seen['erased']['rate']:.3f} (worst person {seen['erased']['highest']:.3f})  retained {seen['retained']['rate']:.3f}")
    print("chosen:", json.dumps(result["chosen"], indent=1))
    (Path(__file__).parent / "tune.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
