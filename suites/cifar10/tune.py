"""Find presets on the development class: the most retention subject to erased <= .02, by the celebrity suite's rule and command.

    python -m suites.cifar10.tune [--store DIR] [--workers N] [--method dimum,salun] [--first N]

Classes of `pocket-development.toml` and seed 100 only. Writes `tune.json` (every trial with its counts) beside this file and prints
the choice, which is then written into `harness/pocket/ddpm/presets.toml` by hand. A trial is about a minute on one quiet core.
"""

from __future__ import annotations

from pathlib import Path

from suites.celebrity import tune

SHORT = "batch=8:images_per_prompt=16"
TRIALS = {
    "dimum": [f"dimum:{SHORT}:lr={lr}:steps=60" for lr in ("5e-4", "3e-4", "2e-4", "1e-4")],
    "salun": [f"salun:{SHORT}:alpha=1:mask_guidance=1:lr={lr}:steps=60" for lr in ("5e-4", "1e-3", "3e-4", "2e-4")],
    "sfron": [f"sfron:{SHORT}:forget={how}:mask_guidance=1:lr={lr}:decay=60:steps=60" for how, lr in (("rl", "5e-4"), ("rl", "1e-3"), ("adaga", "5e-4"))],
    "erasediff": [f"erasediff:{SHORT}:barrier=gradient:lr={lr}:steps=60" for lr in ("5e-4", "1e-3")],
    "esd": [f"esd:trains=f:batch=8:sampler_steps=6:guidance=2:lr={lr}:steps=60" for lr in ("2e-4", "5e-4")],
    "ga": [f"ga:{SHORT}:clip=1:lr={lr}:steps={n}" for lr, n in (("3e-4", 20), ("1e-4", 60))],  # the control's preset is no trial
}

if __name__ == "__main__":
    tune.main(tune.Grid(Path(__file__).parent, TRIALS, (50, 40)), __doc__)
