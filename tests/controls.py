"""Gate the gate: candidates whose verdict is known go through the real command line.

    python -m tests.controls FOLDER

makes a forgetter (really forgets), a pretender (hides the concept behind an edit that fine-tuning washes away), a
bystander (does nothing) and noise (draws nothing), gates each of them with `pytest suites/celebrity --candidate`, and
fails unless the exit codes are what they must be.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fixtures.models import presets
from harness import catalogue, pipeline
from harness.catalogue import Spec
from harness.engine import Engine
from harness.spec import Lineage, Task
from harness.store import Store

ROOT = Path(__file__).parent.parent
EXPECTED = {"forgetter": {0}, "pretender": {1}, "bystander": {1, 11}, "noise": {1}}


def make(folder: Path) -> dict[str, Path]:
    """The four candidates as delta files."""
    task = Task.load(ROOT / "suites" / "celebrity" / "pocket.toml")
    root = Lineage(pipeline.identify("pocket"), task)
    engine = Engine(Store(folder / "store"), print)
    pipe = engine.load(root)
    noise = torch.Generator().manual_seed(0)
    deltas = {
        "forgetter": forgetter(pipe, task),
        "bystander": {"unet.conv_out.bias": pipe.named()["unet.conv_out.bias"].detach().clone()},
        "noise": {name: torch.randn(p.shape, generator=noise) * 0.05 for name, p in pipe.named().items() if name.startswith("unet.")},
    }
    pretender = root.then(catalogue.make("unlearning", Spec.parse(task.control), presets("pocket")))
    engine.load(pretender)
    deltas["pretender"] = {name: p.detach().clone() for name, p in pipe.named().items() if ".attn2." in name}
    paths = {name: folder / f"{name}.safetensors" for name in deltas}
    for name, tensors in deltas.items():
        save_file(tensors, paths[name])
    return paths


def forgetter(pipe: pipeline.Pipe, task: Task) -> dict[str, torch.Tensor]:
    """Text embeddings in which the words that only an erased person bears read 'person'.

    What the UNet knows of the name can then not be asked for, and fine-tuning the UNet cannot bring it back.
    """
    name = "text_encoder.text_model.embeddings.token_embedding.weight"
    name = name if name in pipe.named() else name.replace("text_model.", "")
    table = pipe.named()[name].detach().clone()
    others = [c for g in (task.retained, task.retain, *task.finetune.values()) for c in g.concepts]
    taken = {i for c in others for i in words(pipe, c)}
    for concept in task.erased.concepts:
        for token in set(words(pipe, concept)) - taken:
            table[token] = table[words(pipe, "person")[0]]
    return {name: table}


def words(pipe: pipeline.Pipe, text: str) -> list[int]:
    """Token ids of a text without its start and end."""
    return list(pipe.tokenizer(text).input_ids[1:-1])


def gate(candidate: Path, folder: Path) -> tuple[int, dict[str, object]]:
    """Exit code and verdict.json of the real command."""
    report = folder / f"report-{candidate.stem}"
    command = [sys.executable, "-m", "pytest", "suites/celebrity", "-n", "2", "-q", "--candidate", str(candidate)]
    command += ["--store", str(folder / "store"), "--report", str(report)]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return code, json.loads((report / "verdict.json").read_text(encoding="utf-8"))


def main(folder: Path) -> int:
    """Make, gate, compare."""
    wrong = []
    for name, path in make(folder).items():
        code, verdict = gate(path, folder)
        right = code in EXPECTED[name] and verdict["gate"] is True and verdict["exit_code"] == code
        print(f"control {name}: exit {code}, expected {sorted(EXPECTED[name])}: {'right' if right else 'WRONG'}", flush=True)
        wrong += [] if right else [name]
    print(f"{len(EXPECTED) - len(wrong)} passed, {len(wrong)} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    sys.exit(main(target))
