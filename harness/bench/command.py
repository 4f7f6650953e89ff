"""What the harness costs on this machine, in one run: a table on the terminal, and the numbers as JSON.

python -m harness bench [--only cold,collect,...] [--quick] [--steps N] [--json FILE] [--folder DIR]

cold       the celebrity suite on the pocket model from an empty store, on one thread: share of the time inside model, detector and
           optimizer; UNet passes and minutes against the plan; images a verdict against a fixed number
warm       the same command again
bytes      each checkpoint of that store against a full copy of the model
workers    two workers against one worker on one thread, and against one worker on two; each from an empty store
collect    collecting all suites
snapshots  a fine-tune looked at after 50, 100, 200 and 300 steps, as one run and as four
methods    every unlearning method: seconds, and passes against the plan
sampling   base accuracy at 3 to 8 sampling steps, and the fewest that keep .97
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.bench import gate, stages
from harness.errors import ResurgenceError, unknown

PARTS = {
    "cold": gate.cold,
    "warm": gate.warm,
    "bytes": gate.stored,
    "workers": gate.workers,
    "collect": gate.collect,
    "snapshots": stages.snapshots,
    "methods": stages.methods,
    "sampling": stages.sampling,
}
TARGETS = {
    ("cold", "share inside model, detector, optimizer"): (">=", 0.75),
    ("workers", "two workers / one on one thread"): ("<=", 0.65),
    ("workers", "two workers / one on two threads"): ("<=", 1.0),
    ("collect", "seconds"): ("<=", 1.0),
    ("sampling", "base accuracy at the task's steps"): (">=", stages.KEPT),
}


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--only", metavar="PART,...", help=f"some of {', '.join(PARTS)} (default all)")
    parser.add_argument("--quick", action="store_true", help="a few steps and images of everything: shows that it runs, measures nothing")
    parser.add_argument("--steps", type=int, metavar="N", help="methods: so many steps instead of the presets'")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there, after each part")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep stores, reports and logs there, in a folder that is empty or new")


def main(given: argparse.Namespace) -> int:
    """Measure the parts one after the other; the exit code is 1 if one could not be measured."""
    chosen = given.only.split(",") if given.only else list(PARTS)
    for name in chosen:
        if name not in PARTS:
            raise unknown("part of the bench", name, PARTS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    found: dict[str, Any] = {"machine": platform.platform(), "processors": os.cpu_count(), "quick": given.quick, "parts": {}}
    with tempfile.TemporaryDirectory(prefix="resurgence-bench-") as temporary:
        bench = gate.Bench(given.folder or Path(temporary), given.quick, given.steps)
        for name in chosen:
            try:
                found["parts"][name] = PARTS[name](bench)
            except ResurgenceError as error:
                found["parts"][name] = {"error": str(error)}
            print("\n".join(lines(name, found["parts"][name])), flush=True)
            if given.json:
                given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return int(any("error" in part for part in found["parts"].values()))


def lines(name: str, figures: Mapping[str, Any]) -> list[str]:
    """A part's figures for people: single numbers with their targets, then its table."""
    table = figures.get("rows", [])
    text = ["", f"== {name}"]
    text += [f"{label:<44} {_said(value)}{_target(name, label, value)}" for label, value in figures.items() if label != "rows"]
    if table:
        cells = [list(table[0]), *([_said(value) for value in row.values()] for row in table)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        text += ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in cells]
    return text


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, list):
        return " to ".join(_said(each) for each in value)
    return f"{value:,.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def _target(part: str, label: str, value: Any) -> str:
    if (part, label) not in TARGETS:
        return ""
    sign, limit = TARGETS[part, label]
    met = value >= limit if sign == ">=" else value <= limit
    return f"   target {sign} {limit:g}: {'met' if met else 'MISSED'}"
