"""Find presets of fine-tunes and attacks on the development class, by the celebrity suite's rule and command.

    python -m suites.cifar10.tune_attacks [--store DIR] [--workers N] [--of lora,full,dimra,malicious]

Classes of `pocket-development.toml` and seed 100 only. Writes `tune_attacks.json` (every trial) beside this file and prints the choice,
which is then written into `harness/pocket/ddpm/presets.toml` by hand. A trial, which is two models, is about two minutes on one quiet core.
"""

from __future__ import annotations

from pathlib import Path

from suites.celebrity import tune_attacks

SHORT = "batch=8:images_per_prompt=16"
TRIALS = {
    "lora": [f"lora-in:{SHORT}:lr={lr}" for lr in ("2e-3", "5e-3", "1e-2")],
    "full": [f"full-in:{SHORT}:lr={lr}" for lr in ("1e-4", "2e-4", "5e-4")],
    "dimra": [f"dimra-retain:{SHORT}:lr={lr}" for lr in ("2e-4", "5e-4")],
    "malicious": [f"malicious-one:batch=8:images_per_concept=16:lr={lr}" for lr in ("1e-4", "2e-4")],
}

if __name__ == "__main__":
    tune_attacks.main(tune_attacks.Grid(Path(__file__).parent, TRIALS, dict.fromkeys(TRIALS, 100), (40, 20)), __doc__)
