"""From a cell to its model: what the names on the command line amount to, as lineages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fixtures.lab import Lab
from fixtures.models import Models
from fixtures.options import Cell
from harness.engine import Engine
from harness.errors import SpecError
from harness.spec import Task
from harness.store import Store
from tests.test_options import parsed

TASK = Task.load(Path(__file__).parents[1] / "suites" / "celebrity" / "pocket.toml")
CELL = Cell("stays-forgotten", "esd", "lora-in", 50, "Juno Marchetto", 2)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """Of the pocket model; nothing is made."""
    return Models(parsed(), TASK, Engine(Store(tmp_path)))


def test_the_first_fine_tune_is_the_replicates_own(models: Models) -> None:
    """Unlearning and fine-tuning share the replicate's seed, so that what earlier runs stored is found."""
    assert [stage.seed for stage in models.lineage(CELL).stages] == [2, 2]


def test_further_fine_tunes_start_from_the_same_unlearned_model(models: Models) -> None:
    """One parent; images of their own and an order of their own."""
    one, two = (models.lineage(replace(CELL, tune=tune)) for tune in (0, 1))
    assert one.parent.key == two.parent.key == models.parent(CELL).key
    assert (two.stages[-1].seed, two.key == one.key) == (1002, False)
    sets = [each.stages[-1].images(TASK.view(("finetune",)))["train"] for each in (one, two)]
    assert sets[0].prompts == sets[1].prompts
    assert not set(sets[0].seeds) & set(sets[1].seeds)


def test_an_attack_is_the_replicates_own(models: Models) -> None:
    """Fine-tune seeds are asked of fine-tunes."""
    attacked = models.lineage(replace(CELL, finetune=None, attack="dimra-retain"))
    assert [stage.seed for stage in attacked.stages] == [2, 2]


def test_prepare_makes_every_fine_tune(models: Models) -> None:
    """Both fine-tunes of the one model are built, and that model once; instruments need none."""
    built: list[str] = []
    models.engine = SimpleNamespace(build=lambda lineages: built.extend(each.key for each in lineages) or {})  # type: ignore[assignment]  # all that prepare asks
    cells = [CELL, replace(CELL, tune=1), replace(CELL, claim="instruments")]
    models.prepare(cells)
    assert {models.lineage(cell).key for cell in cells[:2]} <= set(built)
    assert len(built) == len(set(built))


def test_every_fine_tune_is_a_cell_among_which_broken_is_said(tmp_path: Path) -> None:
    """Multiplicity: with three fine-tunes of each model, *broken* takes alpha over three times as many fine-tuned cells."""
    one, three = (Lab(parsed("--finetune-seeds", n), TASK, Engine(Store(tmp_path))).cells for n in ("1", "3"))
    unlearned, tuned = 3 * 5, 3 * 2 * 5
    assert (one, three) == (unlearned + tuned, unlearned + 3 * tuned)


def test_a_method_of_another_family_costs_its_own_claims(tmp_path: Path) -> None:
    """UCE needs text: on a class-conditional model its claims tell so, and those of the others are measured."""
    task = Task.load(Path(__file__).parents[1] / "suites" / "cifar10" / "pocket.toml")
    models, built = Models(parsed("--method", "dimum,uce"), task, Engine(Store(tmp_path))), set[str]()
    models.engine = SimpleNamespace(build=lambda lineages: built.update(each.key for each in lineages) or {})  # type: ignore[assignment]  # all that prepare asks
    cells = {name: Cell("forgotten", name, None, 0, "automobile") for name in ("dimum", "uce")}
    models.prepare(cells.values())
    assert models.require(models.lineage(cells["dimum"])).key in built
    with pytest.raises(SpecError, match="'uce' runs on text-to-image models"):
        models.require(models.lineage(cells["uce"]))
