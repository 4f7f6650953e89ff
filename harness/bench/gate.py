"""Parts of the bench that run the real command line, `pytest suites/celebrity`, in processes of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness import inventory, pocket
from harness.errors import PreconditionError, SpecError
from harness.store import Store

ROOT = Path(__file__).parents[2]
SUITE = "suites/celebrity"
FIXED = 200  # images of every cell under a protocol that does not stop: the task's cap
ANSWERS = (0, 1, 10, 11, 12)  # exit codes of a run that came to an end
METER = "RESURGENCE_METER"  # as in fixtures/meter.py
INSIDE = {"model": ("unet, looking", "unet, learning", "backward", "text encoder, autoencoder"), "detector": ("detector",), "optimizer": ("optimizer",)}
QUICK = """[sampler]
steps = 1
guidance = 3.0

[tolerance]
drawn = 0.01
mistaken = 0.9
floor = 5
cap = 10
"""


@dataclass(frozen=True)
class Ran:
    """A run that came to an end: the command's seconds, verdict.json, and what the meter says where it had one."""

    seconds: float
    verdict: dict[str, Any]
    metered: dict[str, dict[str, float]]


class Bench:
    """Where stores and reports of the runs lie; `quick` makes every run as short as one can be."""

    def __init__(self, folder: Path, quick: bool = False, steps: int | None = None) -> None:
        self.folder, self.quick, self.steps = folder.resolve(), quick, 2 if quick and steps is None else steps
        if not (ROOT / SUITE).is_dir():
            raise SpecError(f"the bench runs '{SUITE}', which is not part of an installation; start it in a checkout")
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise SpecError(f"'{folder}' is not empty; a cold run needs an empty folder")
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def selection(self) -> list[str]:
        """The standard selection; or two people, one method, two steps and hardly an image."""
        if not self.quick:
            return []
        task = self.folder / "quick.toml"
        task.write_text((ROOT / SUITE / "pocket.toml").read_text(encoding="utf-8").partition("[sampler]")[0] + QUICK, encoding="utf-8")
        return ["--task", str(task), "--profile", "smoke", "--method", "uce", "--steps", "2", "--no-control"]

    def pytest(self, *arguments: str, **environ: str) -> tuple[float, int, str]:
        """Seconds, exit code and output of one command."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        started = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env={**clean, "CI": "1", **environ}, capture_output=True, text=True, check=False)
        return time.monotonic() - started, done.returncode, done.stdout + done.stderr

    def gate(self, name: str, store: str, *arguments: str, threads: int = 1, meter: bool = False) -> Ran:
        """Run the selection on a store in the folder; its report and its output lie in a folder of the run's name."""
        report, metered = self.folder / name, self.folder / f"{name}.meter.json"
        places = ["--store", str(self.folder / store), "--report", str(report)]
        environ = {"OMP_NUM_THREADS": str(threads), METER: str(metered)}
        seconds, code, said = self.pytest(SUITE, *self.selection, *places, *arguments, *(["-p", "fixtures.meter"] if meter else []), **environ)
        (self.folder / f"{name}.log").write_text(said, encoding="utf-8")
        if code not in ANSWERS:
            raise PreconditionError(f"the run '{name}' ended with exit code {code}: {said.strip()[-500:]}")
        verdict = json.loads((report / "verdict.json").read_text(encoding="utf-8"))
        return Ran(seconds, verdict, json.loads(metered.read_text(encoding="utf-8")) if meter else {})

    @cached_property
    def cold(self) -> Ran:
        """One worker on one thread from an empty store, under the meter."""
        return self.gate("cold", "store", meter=True)


def cold(bench: Bench) -> dict[str, Any]:
    """Where the time goes, and what was made against what was planned."""
    planned = plan(bench)
    ran = bench.cold
    run, claims = ran.verdict["run"], ran.verdict["claims"]
    seconds, passes = ran.metered["seconds"], ran.metered["passes"]
    inside = {name: sum(seconds.get(part, 0.0) for part in parts) / ran.seconds for name, parts in INSIDE.items()}
    own = [claim["rate"]["n"] for claim in claims if claim["rate"]]
    looking, learning = (passes.get(f"unet, {what}", 0) for what in ("looking", "learning"))
    learned = seconds.get("unet, learning", 0.0) + seconds.get("backward", 0.0)
    each = seconds.get("unet, looking", 0.0) / max(looking, 1)
    return {
        "seconds": ran.seconds,
        "share inside model, detector, optimizer": sum(inside.values()),
        **{f"  {name}": share for name, share in inside.items()},
        "base accuracy": average(c["rate"]["value"] for c in claims if c["claim"] == "instruments" and c["rate"]),
        "sampling steps": next(iter(run["tasks"].values()))["sampler"]["steps"],
        "UNet passes made": run["unet_passes"],
        "UNet passes planned": planned["passes"],
        "minutes made": ran.seconds / 60,
        "minutes planned": planned["minutes"],
        "ms a pass that looks": each * 1000,
        "a pass that learns, in such passes": learned / max(learning, 1) / each if each else 0.0,
        "images drawn": run["images"],
        "images at a fixed number a rate, planned": planned["images"][-1],
        "images a verdict": average(own),
        "images a verdict / fixed": average(n / FIXED for n in own),
        "verdicts": len(claims),
    }


def plan(bench: Bench) -> dict[str, list[float]]:
    """What `--plan` says of the selection on an empty store, at least and at most."""
    _, code, said = bench.pytest(SUITE, *bench.selection, "--store", str(bench.folder / "nothing"), "--plan")
    line = re.search(r"^sum, at least and at most +\d+ new +(\S+) +(\S+) +(\S+)", said, re.MULTILINE)
    if code or line is None:
        raise PreconditionError(f"--plan ended with exit code {code}: {said.strip()[-500:]}")
    values = ([float(part) for part in word.replace(",", "").split("..")] for word in line.groups())
    return dict(zip(("images", "passes", "minutes"), values, strict=True))


def warm(bench: Bench) -> dict[str, Any]:
    """The same question again, to a store that knows."""
    before = bench.cold.seconds
    ran = bench.gate("warm", "store")
    made = {"UNet passes made": ran.verdict["run"]["unet_passes"], "images drawn": ran.verdict["run"]["images"]}
    return {"seconds": ran.seconds, "of the cold run": ran.seconds / before, **made}


def stored(bench: Bench) -> dict[str, Any]:
    """What each checkpoint takes, with the optimizer's tensors for going on and without, against all weights of the model."""
    _ = bench.cold
    store = Store(bench.folder / "store")
    full = sum(path.stat().st_size for path in pocket.MODEL.glob("*/*.safetensors"))
    rows: list[dict[str, Any]] = []
    for address in store.addresses("checkpoints"):
        folder = store.folder("checkpoints", address)
        weights, whole = (folder / "weights.safetensors").stat().st_size, inventory.Artefact(folder).bytes
        name = " > ".join(inventory.stage({k: v for k, v in each.items() if k != "task"}) for each in store.record(folder)["stages"])
        rows.append({"checkpoint": name, "weights, bytes": weights, "of a full copy": weights / full, "with optimizer": whole, "of a copy": whole / full})
    return {"a full copy, bytes": full, "checkpoints": len(rows), "mean share, weights": average(row["of a full copy"] for row in rows), "rows": rows}


def workers(bench: Bench) -> dict[str, Any]:
    """Three cold runs: one worker on one thread, two workers, one worker on two threads."""
    alone, two, threads = bench.gate("alone", "store-alone"), bench.gate("two", "store-two", "-n", "2"), bench.gate("threads", "store-threads", threads=2)
    words = [{claim["id"]: claim["verdict"] for claim in ran.verdict["claims"]} for ran in (alone, two)]
    return {
        "one worker on one thread, seconds": alone.seconds,
        "two workers, seconds": two.seconds,
        "one worker on two threads, seconds": threads.seconds,
        "two workers / one on one thread": two.seconds / alone.seconds,
        "two workers / one on two threads": two.seconds / threads.seconds,
        "images drawn, alone and by two": [alone.verdict["run"]["images"], two.verdict["run"]["images"]],
        "verdicts that two workers changed": sum(words[0].get(id) != words[1].get(id) for id in words[0].keys() | words[1].keys()),
    }


def collect(bench: Bench) -> dict[str, Any]:
    """The best of some collections of all suites, which must not load torch."""
    runs = [bench.pytest("suites", "--collect-only", "-q", OMP_NUM_THREADS="1") for _ in range(1 if bench.quick else 3)]
    if any(code for _, code, _ in runs):
        raise PreconditionError(f"collecting failed: {runs[-1][2].strip()[-500:]}")
    return {"seconds": min(seconds for seconds, _, _ in runs), "claims": runs[0][2].count("::")}


def average(values: Iterable[float]) -> float | None:
    """Their mean; nothing where nothing was measured."""
    found = list(values)
    return sum(found) / len(found) if found else None
