"""The suites' folders: what each promises, and which tasks can be asked of which model."""

from __future__ import annotations

import importlib
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures import claims
from fixtures.controller import Controller
from fixtures.keys import OPTIONS, fits, task_of
from fixtures.options import ATTACKED, CLAIMS, Cell
from fixtures.promises import promise
from harness import catalogue, pocket
from harness.catalogue import Spec
from harness.errors import SpecError
from harness.spec import BROKEN, HOLDS, Base, Group, Lineage, Task
from reports import words
from tests.test_options import parsed

ROOT = Path(__file__).parents[1]
SUITES = ("celebrity", "object", "copyright", "unsafe", "style", "cifar10")
TASKS = {f"{path.parent.name}/{path.stem}": path for suite in SUITES for path in sorted((ROOT / "suites" / suite).glob("*.toml"))}
POCKET = [name for name in TASKS if "/pocket" in name]
PUBLISHED = [name for name in TASKS if "/pocket" not in name and not name.startswith("cifar10/")]
CIFAR10 = [name for name in TASKS if name.startswith("cifar10/") and "/pocket" not in name]
EVERYWHERE = {"instruments", "forgotten", "retained", "stays-forgotten", "stays-out", *ATTACKED}


def task(name: str) -> Task:
    """A task file by suite and id."""
    return Task.load(TASKS[name])


def promised(suite: str) -> dict[str, Any]:
    """The tests of a suite by the claim that each makes."""
    module = importlib.import_module(f"suites.{suite}.test_{suite}")
    tests = [found for name, found in vars(module).items() if name.startswith("test_")]
    marks = [(mark.args[0], test) for test in tests for mark in test.pytestmark if mark.name == "claim"]
    assert len({claim for claim, _ in marks}) == len(marks) == len(tests)  # each test makes one claim, each claim is made once
    return dict(marks)


# --- promises ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_promises_all_that_its_tasks_ask(suite: str) -> None:
    """The claims that every suite makes, and those on synonyms and on another domain wherever one of its tasks has them; none twice, none unknown."""
    tasks = [task(name) for name in TASKS if name.startswith(f"{suite}/")]
    also = {"generality"} if any(t.synonyms for t in tasks) else set()
    also |= {"cross-retained"} if any(t.crossed for t in tasks) else set()
    also |= {"quality"} if any(t.quality for t in tasks) else set()
    assert set(promised(suite)) == EVERYWHERE | also
    assert EVERYWHERE | {"generality", "cross-retained", "quality"} == set(CLAIMS)


@pytest.mark.parametrize("suite", SUITES)
def test_every_sentence_can_be_said_of_a_cell(suite: str) -> None:
    """What stands in braces is known, and each claim has a sentence of its own that ends as one."""
    cell = Cell("", "esd", "lora-in", 50, "Ada", attack="dimra-retain")
    options, of_pocket = parsed("--attack", "dimra-retain"), task(f"{suite}/pocket")
    said = [claims.blank("id", test.__doc__, replace(cell, claim=claim), options, of_pocket).sentence for claim, test in promised(suite).items()]
    assert len(set(said)) == len(said)
    assert all(sentence.endswith(".") and "{" not in sentence for sentence in said)


@pytest.mark.parametrize("verdict", [HOLDS, BROKEN, "inconclusive", "invalid"])
def test_a_promise_is_kept_only_by_what_holds(verdict: str) -> None:
    """Everything but *holds* fails the test."""
    claim: Any = SimpleNamespace(verdict=verdict)
    test = promise("forgotten", "It is {concept}.")
    assert test.__doc__ == "It is {concept}."
    if verdict == HOLDS:
        test(claim)
    else:
        with pytest.raises(pytest.fail.Exception, match=verdict):
            test(claim)


# --- which task, which model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POCKET)
def test_the_pocket_model_knows_all_that_its_tasks_name(name: str) -> None:
    """Concepts are in its vocabulary, whatever their part, and its detectors know those that are looked for."""
    found = task(name)
    fits(found, found.model)
    groups = [found.erased, found.anchor, found.retain, found.retained, *found.finetune.values(), *([found.crossed] if found.crossed else [])]
    assert {concept for group in groups for concept in group.concepts} <= pocket.names()
    eyes = {"pocket": pocket.labels(), "pocket-style": [s["name"] for s in pocket.vocabulary()["concepts"]["styles"]]}
    names = found.detector.get("names", {})
    looked_for = [names.get(concept, concept) for concept in (*found.erased.concepts, *found.retained.concepts)]
    assert set(looked_for) <= set(eyes[found.detector["folder"]])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_task_is_not_asked_of_the_pocket_model(name: str, tmp_path: Path) -> None:
    """Before anything is drawn, the error names the first name that it never learned and asks for a model; another model is not refused."""
    (tmp_path / "i2p.csv").write_text("prompt\na prompt\n")
    found = task(name)
    found = replace(found, asked=str(tmp_path / "i2p.csv")) if found.asked else found
    first = next(iter(found.synonyms.values()))[0] if found.synonyms else found.erased.concepts[0]
    with pytest.raises(SpecError, match=f"never learned '{first}'.*'{found.id}'; give --model"):
        fits(found, "pocket")
    fits(found, "owner/name@revision")


@pytest.mark.parametrize("name", TASKS)
def test_what_a_task_names_exists(name: str) -> None:
    """Suite and folder agree; detectors and control are in their folders; the standard profile's and the full profile's fine-tuning sets are there."""
    found = task(name)
    assert f"{found.suite}/{found.id}" == name
    assert {found.detector["name"], *(table["name"] for table in found.detectors.values())} <= set(catalogue.names("detection"))
    assert {"in", "out"} <= set(found.finetune)
    assert all(catalogue.check("unlearning", Spec.parse(method).name) for method in (found.control, *found.methods))
    cells = [cell for claim in CLAIMS for cell in parsed("--model", "a/b").cells(claim, found)]
    assert len({str(cell) for cell in cells}) == len(cells)


def test_pictures_of_the_unsafe_suite_are_blurred() -> None:
    """Reports blur by the suite's name, so every task of that folder, the harmless one too, has it."""
    assert {task(name).suite for name in TASKS if name.startswith("unsafe/")} <= set(words.VEILED)
    assert not {task(name).suite for name in TASKS if not name.startswith("unsafe/")} & set(words.VEILED)


@pytest.mark.parametrize("said", ["celebrity", "unsafee", ""])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_task_says_whose_it_is(said: str, elsewhere: bool, tmp_path: Path) -> None:
    """A task of nudity that called itself something else would be shown clearly, from the suite's own folder or from another place."""
    folder = tmp_path if elsewhere else tmp_path / "unsafe"
    folder.mkdir(exist_ok=True)
    text = TASKS["unsafe/pocket"].read_text(encoding="utf-8")
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    (folder / "other.toml").write_text(text.replace('suite = "unsafe"', f'suite = "{said}"', 1), encoding="utf-8")
    mine, other = (str(folder / f"{name}.toml") if elsewhere else name for name in ("mine", "other"))
    assert task_of(tmp_path / "unsafe", mine).suite == "unsafe"
    with pytest.raises(SpecError, match=f"other.toml says suite = '{said}'.*tests of 'unsafe'.*allowed: 'unsafe'. Correct"):
        task_of(tmp_path / "unsafe", other)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_one_of_its_suite(name: str) -> None:
    """No shipped task is refused by its own tests."""
    assert task_of(TASKS[name].parent, TASKS[name].stem) == task(name)


# --- prompts that are not shipped -------------------------------------------------------------------------------------


def test_prompts_of_a_users_file(tmp_path: Path) -> None:
    """Read in order from the column `prompt`; they are what the erased concept is measured on, as they are, and the method's own prompts stay."""
    from fixtures.lab import Lab

    (tmp_path / "p.csv").write_text('case_number,prompt\n1,"one, {two}"\n2,three\n')
    found = replace(task("unsafe/nudity"), asked=str(tmp_path / "p.csv"))
    lab = Lab.__new__(Lab)
    lab.task, lab._memory = found, {}
    assert lab._asking("nudity").asking("nudity") == ("one, {two}", "three")
    assert lab._erased() == lab._asking("nudity")
    assert found.erased.asking("nudity")[0] == "bare woman"


def test_a_prompt_that_a_file_repeats_is_asked_once(tmp_path: Path) -> None:
    """Published files repeat some; the same prompt has the same noise, so it would be the same image."""
    from harness.taskfile import prompts_in

    (tmp_path / "p.csv").write_text("prompt\ntwo\none\n two \none\nOne\n")
    assert prompts_in(str(tmp_path / "p.csv"), "ours") == ("two", "one", "One")


def test_what_a_spreadsheet_leaves_below_its_table_is_no_prompt(tmp_path: Path) -> None:
    """Rows at the end with every cell blank, and lines with nothing on them, are passed over."""
    from harness.taskfile import prompts_in

    (tmp_path / "p.csv").write_text("prompt,seed\none,1\n\ntwo,2\n,\n , \n\n")
    assert prompts_in(str(tmp_path / "p.csv"), "ours") == ("one", "two")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not shipped: put them at .*p.csv.*prompts/nudity.csv"),
        ("", "no rows"),
        ("a,b\n1,2\n", "needs a column 'prompt'.*it has a, b"),
        ("prompt\n  \n", "p.csv' needs a column 'prompt' and at least one row below its name; it has prompt"),
        ("case_number,prompt\n1,a b\n2,\n", "p.csv' has no prompt in row 3; every row must have one"),
        ('case_number,prompt\n1,"a\nb"\n\n2\n3,c\n', "no prompt in row 4"),
        ("case_number,prompt\n1,a\n,\n3,c\n", "no prompt in row 3"),
        ("case_number,prompt\n1,a\n2,b, with c\n", "more cells in row 3 than its 2 columns; put prompts that contain commas in quotes"),
    ],
)
def test_a_file_of_prompts_that_does_not_serve(text: str | None, message: str, tmp_path: Path) -> None:
    """None, empty, without the column, with a blank cell as a spreadsheet counts its rows: before anything is drawn, the error names the file and
    what is wrong with it.
    """
    if text is not None:
        (tmp_path / "p.csv").write_text(text)
    found = replace(task("unsafe/nudity"), asked=str(tmp_path / "p.csv"))
    with pytest.raises(SpecError, match=f"(?s){message}"):
        fits(found, "a/b")


def test_a_method_that_cannot_serve_a_task_stops_no_other() -> None:
    """DiMUM needs a place for the anchor's name in the erased prompts, and HRM-m has none: its cells fail with that reason, ESD's models are made."""
    from fixtures.lab import Lab

    found, made = task("unsafe/nudity"), list[str]()
    lab = Lab.__new__(Lab)
    lab.options, lab.task, lab._memory, lab.presets = parsed("--no-control", "--method", "esd,dimum"), found, {}, {}
    lab.base = Lineage(Base("digest", "pocket"), found)
    lab.engine = SimpleNamespace(build=lambda lineages: made.extend(each.key for each in lineages) or {})  # type: ignore[assignment]
    esd, dimum = Cell("forgotten", "esd", None, 0, "nudity"), Cell("forgotten", "dimum", None, 0, "nudity")
    lab.prepare([esd, dimum])
    assert made == [lab.lineage(esd).key]
    assert lab.require(lab.lineage(esd))
    with pytest.raises(SpecError, match="must contain"):
        lab.require(lab.lineage(dimum))


@pytest.mark.parametrize("name", TASKS)
def test_no_shipped_task_names_a_method_that_cannot_serve_it(name: str) -> None:
    """By default and in smoke, the control among them: a gate whose own methods are refused could never be green."""
    from fixtures.models import Models

    found = task(name)
    models = Models.__new__(Models)
    models.options, models.task, models._memory, models.presets = parsed("--no-control"), found, {}, {}
    models.base = Lineage(Base("digest", "pocket-ddpm" if found.suite == "cifar10" else "pocket"), found)
    models.engine = SimpleNamespace(build=lambda lineages: {})  # type: ignore[assignment]
    cells = [Cell("forgotten", method, None, 0, found.erased.concepts[0]) for method in {found.control, *found.methods, *found.smoke}]
    models.prepare(cells)
    assert [models.require(models.lineage(cell)) for cell in cells] == [models.lineage(cell) for cell in cells]


# --- published lists --------------------------------------------------------------------------------------------------


def test_maces_celebrities() -> None:
    """100 erased and 100 retained, no name in both; ten and five are the first of the list and the one is its last, who becomes a woman."""
    erased = {n: task(f"celebrity/mace-{n}").erased.concepts for n in (1, 5, 10, 100)}
    assert {n: len(names) for n, names in erased.items()} == {n: n for n in erased}
    assert (erased[100][:5], erased[100][:10], erased[100][-1:]) == (erased[5], erased[10], erased[1])
    kept = {n: task(f"celebrity/mace-{n}").retained.concepts for n in erased}
    assert set(kept.values()) == {task("celebrity/mace-10").retain.concepts}
    assert len(kept[1]) == 100
    assert "Gordon Ramsey" in kept[1]  # as in the authors' files
    assert {n: task(f"celebrity/mace-{n}").anchor.concepts for n in erased} == {1: ("a woman",)} | dict.fromkeys((5, 10, 100), ("a person",))
    assert len(task("celebrity/mace-10").erased.prompts) == 5


def test_objects_are_counted_as_mace_does() -> None:
    """Ten names, no other label; what is not erased must survive; every erased object has three synonyms, none of which is trained on."""
    for name in ("automobile", "ship", "bird", "five"):
        found = task(f"object/{name}")
        assert sorted([*found.erased.concepts, *found.retained.concepts]) == sorted(found.detector["concepts"])
        assert (len(found.detector["concepts"]), found.detector["none"]) == (10, [])
        assert {c: len(names) for c, names in found.synonyms.items()} == dict.fromkeys(found.erased.concepts, 3)


def test_one_rule_each_for_van_gogh() -> None:
    """The benchmark's top-1 and DiMRA's top-3 differ in the rule for the erased style and in the published names, in nothing else."""
    one, three = task("style/van-gogh"), task("style/van-gogh-top3")
    assert (one.detector["rule"], three.detector["rule"]) == ("top-1", "top-3")
    assert {**three.detector, "rule": "top-1"} == three.detectors["retained"] | {"names": three.detector["names"]} == one.detector
    assert {table["rule"] for table in three.detectors.values()} == {"top-1"}
    same = {"id", "source", "detector", "detectors", "figures"}
    assert {k: v for k, v in vars(one).items() if k not in same} == {k: v for k, v in vars(three).items() if k not in same}
    assert one.crossed is not None
    assert len(one.crossed.concepts) == len(one.erased.prompts) == 20


# --- a gate of several suites -----------------------------------------------------------------------------------------


def test_what_one_suite_leaves_out_no_other_makes_up_for() -> None:
    """`10 retained concepts` of one suite are not those of another: each suite needs its own claims."""
    controller = Controller.__new__(Controller)
    options = parsed("--method", "esd")
    controller.config = SimpleNamespace(stash={OPTIONS: options})  # type: ignore[assignment]  # all that is asked of it
    suites = {Path("suites/copyright"): task("copyright/pocket"), Path("suites/unsafe"): task("unsafe/pocket")}
    ids = [f"{suite}/test.py::t[{cell}]" for suite, t in suites.items() for claim in CLAIMS for cell in options.cells(claim, t)]
    controller.selected = dict.fromkeys(ids)
    assert controller._left_out(suites) == []
    gone = "suites/unsafe/test.py::t[esd-unlearned-10 retained concepts]"
    assert gone.replace("unsafe", "copyright") in ids
    controller.selected = dict.fromkeys(id for id in ids if id != gone)
    assert controller._left_out(suites) == [f"1 of {len(ids)} claims are left out by the selection"]


# --- a user's own concept ---------------------------------------------------------------------------------------------


def test_the_readmes_ten_lines_are_a_task(tmp_path: Path) -> None:
    """The block is ten lines, loads as it is, names a detector that works for any concept, and has every part a claim needs."""
    block = re.search(r"```toml\n(suite = .*?)```", (ROOT / "suites" / "README.md").read_text(), re.DOTALL)
    assert block
    assert len(block[1].strip().splitlines()) == 10
    (tmp_path / "mine.toml").write_text(block[1])
    found = Task.load(tmp_path / "mine.toml")
    assert (found.id, found.detector["name"]) == ("mine", "gallery")
    assert tomllib.loads(block[1])["suite"] in SUITES
    assert catalogue.check("unlearning", found.control)
    cells = [cell for claim in CLAIMS for cell in parsed("--model", "a/b").cells(claim, found)]
    assert {cell.claim for cell in cells} == {"instruments", "forgotten", "retained", "stays-forgotten"}
    assert isinstance(found.erased, Group)


COMMANDS = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "suites").rglob("*.py")) if not path.stem.startswith(("test_", "_"))]


@pytest.mark.parametrize("name", [".".join(path.parts) for path in COMMANDS])
def test_a_recipe_can_be_started(name: str) -> None:
    """The commands that committed numbers name still import."""
    assert importlib.import_module(name).__doc__
