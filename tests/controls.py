"""Gate the gate: candidates whose verdict is known go through the real command line.

    python -m tests.controls FOLDER [SUITE ...]

makes a forgetter (really forgets), a pretender (hides the concept behind an edit that fine-tuning washes away), a
bystander (does nothing) and noise (draws nothing), gates each of them with `pytest suites/SUITE --candidate`, and fails
unless the exit codes are what they must be. Without SUITE: celebrity.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from fixtures.models import presets
from harness import catalogue, pipeline
from harness.catalogue import Spec
from harness.engine import Engine
from harness.families.class_conditional import ClassConditional
from harness.spec import Lineage, Task
from harness.store import Store

ROOT = Path(__file__).parent.parent
EXPECTED = {"forgetter": {0}, "pretender": {1}, "bystander": {1, 11}, "noise": {1}}


def make(folder: Path, suite: str) -> dict[str, Path]:
    """The candidates as delta files."""
    task = Task.load(ROOT / "suites" / suite / "pocket.toml")
    root = Lineage(pipeline.identify(task.model), task)
    engine = Engine(Store(folder / "store"), print)
    pipe = engine.load(root)
    weights = {name: p.detach().clone() for name, p in pipe.named().items()}
    noise = torch.Generator().manual_seed(0)
    deltas = {
        "forgetter": forgetter(pipe, task),
        "bystander": {"unet.conv_out.bias": weights["unet.conv_out.bias"]},
        "noise": {name: torch.randn(p.shape, generator=noise) * 0.05 for name, p in weights.items() if name.startswith("unet.")},
    }
    engine.load(root.then(catalogue.make("unlearning", Spec.parse(task.control), presets(task.model))))
    deltas["pretender"] = {name: p.detach().clone() for name, p in pipe.named().items() if not p.equal(weights[name])}
    paths = {name: folder / f"{suite}-{name}.safetensors" for name in deltas}
    for name, tensors in deltas.items():
        save_file(tensors, paths[name])
    return paths


def forgetter(pipe: pipeline.Pipe, task: Task) -> dict[str, torch.Tensor]:
    """Embeddings in which the words that only an erased concept bears, or its class, read as the anchor's last.

    What the UNet knows of the name can then not be asked for, and fine-tuning the UNet cannot bring it back.
    """
    name = next(name for name in pipe.named() if name.endswith(("token_embedding.weight", "class_embedding.weight")))
    table = pipe.named()[name].detach().clone()
    others = [c for g in (task.anchor, task.retained, task.retain, *task.finetune.values()) for c in g.concepts]
    taken = {i for c in others for i in words(pipe, c)}
    for concept in task.erased.concepts:
        for token in set(words(pipe, concept)) - taken:
            table[token] = table[words(pipe, task.anchor.concepts[0])[-1]]
    return {name: table}


def words(pipe: pipeline.Pipe, text: str) -> list[int]:
    """Token ids of a text without its start and end; the label of a class."""
    return pipe.encode([text]).tolist() if isinstance(pipe, ClassConditional) else list(pipe.tokenizer(text).input_ids[1:-1])


def gate(suite: str, candidate: Path, folder: Path) -> tuple[int, dict[str, object]]:
    """Exit code and verdict.json of the real command."""
    report = folder / f"report-{candidate.stem}"
    command = [sys.executable, "-m", "pytest", f"suites/{suite}", "-n", "2", "-q", "--candidate", str(candidate)]
    command += ["--store", str(folder / "store"), "--report", str(report)]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return code, json.loads((report / "verdict.json").read_text(encoding="utf-8"))


def main(folder: Path, suites: Sequence[str]) -> int:
    """Make, gate, compare."""
    right = []
    for suite in suites:
        for name, path in make(folder, suite).items():
            code, verdict = gate(suite, path, folder)
            right.append(code in EXPECTED[name] and verdict["gate"] is True and verdict["exit_code"] == code)
            print(f"{suite}, control {name}: exit {code}, expected {sorted(EXPECTED[name])}: {'right' if right[-1] else 'WRONG'}", flush=True)
    print(f"{sum(right)} passed, {len(right) - sum(right)} failed")
    return 0 if all(right) else 1


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    sys.exit(main(target, sys.argv[2:] or ["celebrity"]))
