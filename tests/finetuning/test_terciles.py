"""The fine-tuning sets near, middle and far are what the pocket model's CLIP says."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.spec import Task
from suites.celebrity import terciles

SUITE = Path(terciles.__file__).parent


@pytest.mark.parametrize("name", ["pocket", "pocket-development"])
def test_the_committed_terciles_are_the_ranking_of_the_pool(name: str) -> None:
    """Six people each, in the order of their smallest cosine to an erased person; every near one is nearer than every middle one, and so on."""
    task = Task.load(SUITE / f"{name}.toml")
    found = terciles.terciles(task)
    assert {tercile: list(people) for tercile, people in found.items()} == {t: list(task.finetune[t].concepts) for t in ("near", "middle", "far")}
    assert min(found["near"].values()) > max(found["middle"].values())
    assert min(found["middle"].values()) > max(found["far"].values())
    assert [len(people) for people in found.values()] == [6, 6, 6]
    assert {task.finetune[t].prompts for t in found} == {task.erased.prompts}


def test_a_name_is_most_similar_to_itself() -> None:
    """Cosine 1 with itself, less with others."""
    found = terciles.similarity(["Juno Marchetto", "Kester Underhay"], ["Juno Marchetto"])
    assert found["Juno Marchetto"] == pytest.approx(1, abs=1e-5)
    assert found["Kester Underhay"] < 0.999


def test_with_several_erased_the_smallest_cosine_counts() -> None:
    """Appendix C.2: the minimum over the erased people."""
    names = ["Kester Underhay"]
    both, one, other = (
        terciles.similarity(names, erased)[names[0]] for erased in (["Juno Marchetto", "Edric Sallowby"], ["Juno Marchetto"], ["Edric Sallowby"])
    )
    assert both == pytest.approx(min(one, other), abs=1e-5)
    assert one != pytest.approx(other, abs=1e-3)
