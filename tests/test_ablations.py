"""Published figures and tables as parameters: they can all be built, and nobody runs them by accident."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fixtures import stages
from fixtures.models import presets
from fixtures.options import Cell
from harness.catalogue import Spec
from harness.spec import Task
from tests.test_options import TASK, parsed

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.stem for path in (ROOT / "suites" / "celebrity").glob("test_*.py") if path.stem != "test_celebrity")


def marks(name: str) -> tuple[str, dict[str, object]]:
    """The claim of a module's test and what it varies."""
    module = importlib.import_module(f"suites.celebrity.{name}")
    found = {mark.name: mark for mark in getattr(module, name).pytestmark}
    return found["claim"].args[0], found["ablation"].kwargs


@pytest.mark.parametrize("name", MODULES)
def test_every_variation_is_a_lineage_that_can_be_built(name: str) -> None:
    """Methods, fine-tunes and attacks exist with the fields that are varied, on the committed task, and give different cells."""
    claim, varied = marks(name)
    task = Task.load(ROOT / "suites" / "celebrity" / "pocket.toml")
    cells = parsed("--attack", "malicious-several").ablated(claim, task, **varied)  # type: ignore[arg-type]  # what the marker holds
    assert cells
    assert len({str(cell) for cell in cells}) == len(cells)
    for cell in cells:
        assert stages.unlearning(cell.method, presets("pocket"))
        assert not cell.finetune or Spec.parse(cell.finetune).name.partition("-")[2] in task.finetune
        assert not cell.attack or stages.relearning(cell.attack, presets("pocket"))


def test_what_is_varied_by_hand() -> None:
    """Two counts of erased people: 1 + 2 cells a fine-tune step and method; other methods take the place of the selected ones."""
    found = parsed("--method", "esd", "--steps", "50").ablated("stays-forgotten", TASK, erased=(1, 2), methods=["uce", "uce:ridge=1"])
    assert Counter((cell.method, cell.erased) for cell in found) == Counter({("uce", 1): 1, ("uce:ridge=1", 1): 1, ("uce", 2): 2, ("uce:ridge=1", 2): 2})
    assert parsed().ablated("forgotten", TASK) == parsed().cells("forgotten", TASK)
    assert str(Cell("stays-forgotten", "uce", "lora-in", 50, "Ada", 0, None, 2)) == "uce-erased2-lora-in-50-Ada"


@pytest.mark.parametrize(("written", "some"), [([], False), (["-m", "ablation"], True)])
def test_ablations_run_only_when_they_are_named(written: list[str], some: bool) -> None:
    """Without -m ablation the suite is the gate, with it the figures and nothing else."""
    command = [sys.executable, "-m", "pytest", "suites/celebrity", "--collect-only", "-q", "--profile", "smoke", "--method", "uce", *written]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    files = {line.partition("::")[0].rpartition("/")[2] for line in run.stdout.splitlines() if "::" in line}
    assert files == ({f"{name}.py" for name in MODULES} if some else {"test_celebrity.py"}), run.stdout


def test_collecting_the_suites_imports_no_torch() -> None:
    """The published figures lie beside the claims and cost nothing until they are asked for; nor does a plugin that has nothing to say."""
    heavy = "{'torch', 'hypothesis'}"
    code = f"import sys, pytest; code = pytest.main(['suites', '--collect-only', '-q']); sys.exit(code or 2 * bool({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-500:]
