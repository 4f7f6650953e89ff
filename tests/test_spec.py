"""The nouns and their addresses."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import typing
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import pytest

from harness import catalogue, pocket
from harness.catalogue import Spec
from harness.errors import ResurgenceError, SpecError, unknown
from harness.spec import Base, Claim, Group, ImageSet, Lineage, Sampler, Task, Tolerance, Verbatim, key, seed_of

ROOT = Path(__file__).parents[1]
TASKS = sorted(ROOT.glob("suites/*/*.toml"))
STAGES = [(kind, name) for kind in ("unlearning", "finetuning") for name in catalogue.names(kind)]
VALUE = {"b": [1, 2.5, None, True], "a": "Zoë", "nested": {"y": 1, "x": (2, 3)}}


@dataclass(frozen=True)
class Stage:
    """A stage that only has an address."""

    lr: float = 0.1
    steps: int = 4
    seed: int = 0
    path: str = field(default="here", metadata={"address": False})
    version: ClassVar[int] = 1
    trains: ClassVar[str] = "unet"
    reads: ClassVar[tuple[str, ...]] = ("erased",)


def task(**changes: Any) -> Task:
    """A task of one-letter concepts."""

    def group(*concepts: str) -> Group:
        return Group(concepts, ("a {}",))

    parts: dict[str, Any] = {
        "erased": group("x"),
        "anchor": group("p"),
        "retain": group("k"),
        "finetune": {"in": group("f"), "out": group("o")},
        "retained": group("r"),
    }
    return Task(id="t", suite="celebrity", source="made up", sampler=Sampler(2, 3.0), detector={"name": "d"}, control="esd", **(parts | changes))


def lineage(*stages: Any, **changes: Any) -> Lineage:
    """The stages on top of a base model that does not exist."""
    return Lineage(Base("digest", "source"), task(**changes), stages)


def answers(code: str, **environ: str) -> str:
    """What a fresh interpreter prints for `code`."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


# --- addresses -------------------------------------------------------------------------------------------------------


def test_a_key_never_changes():
    """The address of one value, written down: if this changes, every store in the world is worthless."""
    assert key(VALUE) == "13e915684d20f1a868a8b11e89d000dc"


def test_a_key_is_the_same_in_every_process():
    """Neither the process, nor its hash seed, nor the order of a dictionary moves an address."""
    code = f"from harness.spec import key; v = {VALUE!r}; print(key(v), key(dict(reversed(v.items()))))"
    assert [f"{key(VALUE)} {key(VALUE)}"] * 2 == [answers(code, PYTHONHASHSEED=seed) for seed in ("1", "2")]


def test_different_values_have_different_keys():
    """Kind, order, nesting and spelling count."""
    values = [1, 1.5, "1", True, None, [1], [[1]], {"1": 1}, [1, 2], [2, 1], ["12"], ["1", "2"], "é", "e\u0301", ""]
    assert len({key(value) for value in values}) == len(values)


def test_a_tuple_and_a_list_are_one_value():
    """What JSON cannot tell apart has one address, so a field read back from JSON keeps it."""
    assert key({"a": (1, (2, 3))}) == key({"a": [1, [2, 3]]})


@pytest.mark.parametrize("value", [{1, 2}, object(), Path("x"), b"x", Stage])
def test_what_has_no_canonical_form_has_no_key(value):
    """A value that JSON does not know is refused, not turned into its `repr`."""
    with pytest.raises(SpecError, match=type(value).__name__):
        key([value])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_has_no_key(value):
    """NaN differs from itself: it is refused as an error of the request."""
    with pytest.raises(SpecError, match=str(value)):
        key({"lr": value})


def test_a_seed_fits_torch_and_depends_on_every_part():
    """63 bits, the same everywhere, another one for other parts."""
    seeds = {seed_of("a", i, j) for i in range(20) for j in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of("training image", 0, 0) == 2471014393809161883


# --- lineages --------------------------------------------------------------------------------------------------------


def test_fields_out_of_the_address():
    """Where a thing lies is not what it is: fields marked so leave the key alone."""
    assert lineage(Stage()).key == lineage(Stage(path="there")).key
    assert Lineage(Base("digest", "here"), task()).key == Lineage(Base("digest", "there"), task()).key
    assert lineage(Stage()).trajectory == lineage(Stage(path="there")).trajectory


def test_the_base_models_content_is_in_the_address():
    """Another model, another key and another trajectory."""
    one, other = (Lineage(Base(digest, "source"), task(), (Stage(),)) for digest in ("a", "b"))
    assert one.key != other.key
    assert one.trajectory != other.trajectory


def test_the_version_and_the_class_are_in_the_address(monkeypatch):
    """A stage whose results changed gets a new address by its `version`; a namesake elsewhere never had the same."""

    class Other(Stage):
        pass

    before = lineage(Stage()).key
    assert lineage(Other()).key != before
    monkeypatch.setattr(Stage, "version", 2)
    assert lineage(Stage()).key != before


def test_what_a_stage_reads_of_the_task_is_in_the_address_and_nothing_else():
    """A stage that reads `erased` keeps its address when another role changes."""
    before = lineage(Stage()).key
    assert lineage(Stage(), erased=Group(("z",), ("a {}",))).key != before
    assert lineage(Stage(), erased=Group(("x",), ("the {}",))).key != before
    assert lineage(Stage(), retained=Group(("z",), ("a {}",))).key == before
    assert lineage(Stage(), tolerance=Tolerance(tau=0.2)).key == before


def test_a_stage_sees_what_its_address_contains_and_nothing_else():
    """A view of the task has the named parts only."""
    assert vars(task().view(("erased", "anchor"))) == {"erased": task().erased, "anchor": task().anchor}


def test_order_and_repetition_of_stages_are_in_the_address():
    """Unlearning then fine-tuning is not fine-tuning then unlearning."""
    a, b = Stage(lr=1.0), Stage(lr=2.0)
    chains = [(), (a,), (b,), (a, b), (b, a), (a, a), (a, b, a)]
    assert len({lineage(*chain).key for chain in chains}) == len(chains)
    assert len({lineage(*chain).trajectory for chain in chains}) == len(chains)


def test_snapshots_of_one_trajectory_share_its_address():
    """Steps of the last stage are the only thing that two snapshots of a trajectory do not share."""
    short, long = lineage(Stage(steps=2)), lineage(Stage(steps=4))
    assert short.key != long.key
    assert short.trajectory == long.trajectory
    assert lineage(Stage(lr=0.2, steps=2)).trajectory != short.trajectory
    assert lineage(Stage(steps=2), Stage()).trajectory != lineage(Stage(steps=4), Stage()).trajectory
    assert [each.steps for each in (lineage(), short, long)] == [0, 2, 4]


def test_a_lineage_and_its_parent():
    """`then` and `parent` undo each other."""
    root = lineage()
    assert root.then(Stage()).parent == root
    assert root.then(Stage(), Stage(lr=2.0)).stages == (Stage(), Stage(lr=2.0))


def test_the_record_says_what_the_key_was_made_of():
    """A record can be read by people, saved as JSON, and hashed to its key again."""
    record = json.loads(json.dumps(lineage(Stage()).record()))
    stage = {"class": f"{__name__}.Stage", "version": 1, "lr": 0.1, "steps": 4, "seed": 0, "task": {"erased": {"concepts": ["x"], "prompts": ["a {}"]}}}
    assert record == {"key": lineage(Stage()).key, "base": "digest", "stages": [stage]}
    assert key([{"digest": record["base"]}, record["stages"]]) == record["key"]


def other(hint: Any, name: str, value: Any) -> Any:
    """Another value of a field."""
    names = {"trains": ("u", "f"), "data": ("in", "out")}
    options = names.get(name) or (typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ())
    if options:
        return next(option for option in options if option != value)
    if value is None:
        return "other"
    if isinstance(value, float):
        return value / 2 or 0.25  # also of a share: still a share
    return not value if isinstance(value, bool) else value + {int: 1, str: ",other"}[type(value)]


@pytest.mark.parametrize(("kind", "name"), STAGES)
def test_every_field_of_every_stage_is_in_the_address(kind, name):
    """Whatever field of a stage changes, the address of the weights changes with it, but for those that only say where a file is."""
    stage = catalogue.make(kind, Spec(name), {})
    hints = typing.get_type_hints(type(stage))
    changed = {
        f.name: replace(stage, **{f.name: other(hints[f.name], f.name, getattr(stage, f.name))}) for f in fields(stage) if f.metadata.get("address", True)
    }
    keys = {"": lineage(stage).key} | {field: lineage(each).key for field, each in changed.items()}
    assert len(set(keys.values())) == len(keys)
    trajectories = {field: lineage(each).trajectory for field, each in changed.items() if field != "steps"}
    assert len({*trajectories.values(), lineage(stage).trajectory}) == len(trajectories) + 1


# --- groups, samplers, tolerances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a person", "{} and {}", "", "{name}", "{0}"])
def test_a_prompt_names_its_concept_exactly_once(prompt):
    """A prompt without `{}`, or with two, is refused and shown."""
    with pytest.raises(SpecError, match=r"must contain '\{\}' exactly once"):
        Group(("x",), ("a {}", prompt))


def test_a_group_has_somebody_and_something_to_ask():
    """No concepts, no prompts and doubled concepts are refused."""
    for concepts, prompts in (((), ("a {}",)), (("x",), ())):
        with pytest.raises(SpecError, match="at least one"):
            Group(concepts, prompts)
    with pytest.raises(SpecError, match="listed twice: x"):
        Group(("x", "y", "x"), ("a {}",))


@pytest.mark.parametrize(
    ("group", "doubled"),
    [
        (lambda: Group(("x",), ("a {}", "the {}", "a {}")), "a x"),
        (lambda: Group(("x", "a"), ("{} a", "a {}")), "a a"),  # the same once the name is there
        (lambda: Group(("x", "x y"), ("a {} y", "a {}")), "a x y"),  # and of two concepts
        (lambda: Verbatim(("x",), ("a", "b", "b")), "b"),
        (lambda: replace(Group(("x",), ("{} u", "u {}")), concepts=("u",)), "u u"),
    ],
)
def test_a_prompt_is_asked_once(group, doubled):
    """An image's noise depends on prompt and round alone: forty times the same prompt would be one image, counted forty times."""
    with pytest.raises(SpecError, match=f"prompt '{doubled}' is asked 2 times.*write each prompt once"):
        group()


def test_training_images_repeat_their_prompts():
    """Their noise depends on their place, so they are images of their own."""
    images = ImageSet.of(Group(("x",), ("a {}",)), 3, 0)
    assert images.prompts == ("a x",) * 3
    assert len(set(images.seeds)) == 3


@pytest.mark.parametrize("steps", [0, -1, 2.5, math.nan])
def test_a_sampler_takes_steps(steps):
    """Whole ones, from 1."""
    with pytest.raises(SpecError, match="steps must be a whole number from 1, got"):
        Sampler(steps, 3.0)


@pytest.mark.parametrize("guidance", [-1, -0.1, math.nan, math.inf])
def test_a_sampler_is_guided_by_a_number(guidance):
    """From 0: nan and infinity draw nothing, less than 0 draws what was not asked for."""
    with pytest.raises(SpecError, match="guidance must be a number from 0, got"):
        Sampler(2, guidance)
    assert (Sampler(2, 0).guidance, Sampler(2, 1.0).guidance) == (0, 1.0)


def test_a_prompt_is_filled_in_literally():
    """Other braces, of the name or of the prompt, are left alone."""
    assert Group(("x",), ("a {}!", "{} {{b}}")).asking("{y}") == ("a {y}!", "{y} {{b}}")


def test_an_image_set_asks_for_every_concept_under_every_prompt():
    """Concepts x prompts x images, each with a seed of its own, which depends on nothing but the seed and its place."""
    group = Group(("x", "y"), ("a {}", "the {}"))
    chosen = ImageSet.of(group, 2, seed=5)
    assert chosen.prompts == ("a x", "a x", "the x", "the x", "a y", "a y", "the y", "the y")
    assert len(set(chosen.seeds)) == 8
    assert chosen == ImageSet.of(group, 2, seed=5)
    assert not set(chosen.seeds) & set(ImageSet.of(group, 2, seed=6).seeds)


@pytest.mark.parametrize(("kind", "wrong"), [
    (Sampler, {"steps": 0, "guidance": 3.0}),
    (Sampler, {"steps": 2, "guidance": 3.0, "scheduler": "ddmi"}),
    (Tolerance, {"tau": 0.0}),
    (Tolerance, {"alpha": 1.0}),
    (Tolerance, {"retained": 1.2}),
    (Tolerance, {"floor": 0}),
    (Tolerance, {"floor": 50, "cap": 40}),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(kind, wrong):
    """Samplers and tolerances check their own ranges and name what was wrong."""
    with pytest.raises(SpecError, match=next(reversed(wrong)).removesuffix("guidance") or "steps"):
        kind(**wrong)


# --- tasks -----------------------------------------------------------------------------------------------------------

ROLES = ("erased", "anchor", "retain", "retained", "finetune.in", "finetune.out")


@pytest.mark.parametrize(("one", "two"), list(combinations(ROLES, 2))[:-1])  # two fine-tuning sets are one role
def test_roles_are_disjoint(one, two):
    """Nobody plays two roles, in whatever case the name is written; the error names both."""
    groups = {role: Group((role, "Same" if role == one else "sAME"), ("a {}",)) for role in ROLES if role in (one, two)}
    finetune = {"in": Group(("f",), ("a {}",))} | {role.removeprefix("finetune."): g for role, g in groups.items() if "." in role}
    with pytest.raises(SpecError, match=f"is both {one} and {two}"):
        task(finetune=finetune, **{role: g for role, g in groups.items() if "." not in role})


def test_erasing_fewer():
    """`erasing` keeps the first concepts and everything else."""
    many = task(erased=Group(("x", "y", "z"), ("a {}",)))
    assert many.erasing(2) == task(erased=Group(("x", "y"), ("a {}",)))


TOML = """
suite = "celebrity"
source = "made up"
control = "esd"
detector = { name = "d" }
erased = { concepts = ["x"], prompts = ["a {}"] }
anchor = { concepts = ["p"], prompts = ["a {}"] }
retain = { concepts = ["k"], prompts = ["a {}"] }
retained = { concepts = ["r"], prompts = ["a {}"] }
finetune = { in = { concepts = ["f"], prompts = ["a {}"] }, out = { concepts = ["o"], prompts = ["a {}"] } }
sampler = { steps = 2, guidance = 3.0 }
"""


def test_a_task_file_says_what_the_task_says(tmp_path):
    """A file's name is the task's id; what it leaves out is the default."""
    (tmp_path / "t.toml").write_text(TOML)
    assert Task.load(tmp_path / "t.toml") == task()


@pytest.mark.parametrize(("old", "new", "message"), [
    ('control = "esd"', 'contorl = "esd"', "unknown key 'contorl'.*Did you mean 'control'"),
    ("steps = 2", "stesp = 2", r"unknown key in \[sampler\] 'stesp'.*Did you mean 'steps'"),
    ('erased = { concepts', 'erased = { concept', r"unknown key in \[erased\] 'concept'.*Did you mean 'concepts'"),
    ('{ in = { concepts', '{ in = { concept', r"unknown key in \[finetune.in\] 'concept'.*Did you mean 'concepts'"),
    ('suite = "celebrity"', 'suite = "celebrity"\nid = "t"', "unknown key 'id'"),
    ('suite = "celebrity"', 'suite = "celebrity"\ntolerance = { tua = 0.1 }', r"unknown key in \[tolerance\] 'tua'.*Did you mean 'tau'"),
    ('prompts = ["a {}"] }\nanchor', 'prompts = ["a person"] }\nanchor', "'a person' must contain"),
    ('"x"', '"x", "x"', "listed twice: x"),
    ('"a {}"', '"a {}", "a {}"', "'a x' is asked 2 times"),
    ("guidance = 3.0", "guidance = nan", "guidance must be a number from 0, got nan"),
    ("steps = 2", "steps = 0", "whole number from 1, got 0"),
    ('"x"', '"R"', "both erased and retained|both retained and erased"),
    ('concepts = ["x"]', 'concepts = "Tom"', "list"),
    ('prompts = ["a {}"] }\nanchor', 'prompts = "{}" }\nanchor', "list"),
    ('"made up"', "made up", "line 3"),
    ("sampler = { steps = 2, guidance = 3.0 }", "sampler = 2", r"\[sampler\] must be a table"),
    ("sampler = { steps = 2, guidance = 3.0 }", "sampler = { steps = 2 }", r"\[sampler\].*guidance"),
    ("steps = 2", 'steps = "2"', "sampler.steps must be a whole number, got '2'"),
    ("finetune = {", "finetune = 3 # {", r"\[finetune\] needs at least one set"),
    ("finetune = {", "finetune = {} # {", r"\[finetune\] needs at least one set"),
])  # fmt: skip
def test_a_wrong_task_file_is_refused(tmp_path, old, new, message):
    """Every mistake in a task file is a SpecError that names the file and the mistake, and guesses what was meant."""
    assert old in TOML
    (tmp_path / "t.toml").write_text(TOML.replace(old, new, 1))
    with pytest.raises(SpecError, match=f"(?s)task file t.toml: .*({message})"):
        Task.load(tmp_path / "t.toml")


@pytest.mark.parametrize("name", ["erased", "anchor", "retain", "retained", "finetune", "sampler", "suite", "control", "detector"])
def test_a_task_file_lacks_nothing(tmp_path, name):
    """Each group and key is asked for by name if the file lacks it."""
    (tmp_path / "t.toml").write_text("".join(line for line in TOML.splitlines(keepends=True) if not line.startswith(f"{name} =")))
    with pytest.raises(SpecError, match=f"task file t.toml: .*{name}"):
        Task.load(tmp_path / "t.toml")


def test_a_task_file_is_a_text(tmp_path):
    """A file in another encoding is refused like any other mistake."""
    (tmp_path / "t.toml").write_bytes(TOML.encode("utf-16"))
    with pytest.raises(SpecError, match=r"task file t\.toml"):
        Task.load(tmp_path / "t.toml")


# --- the suites' own files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TASKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_task_file_loads(path):
    """A task file lies in the folder of its suite and names a detector and a control that exist."""
    loaded = Task.load(path)
    assert (loaded.id, loaded.suite) == (path.stem, path.parent.name)
    assert loaded.detector["name"] in catalogue.names("detection")
    assert Spec.parse(loaded.control).name in catalogue.names("unlearning")


@pytest.mark.parametrize(("path", "erased"), [("pocket", "report"), ("pocket-development", "development")])
def test_people_play_the_roles_the_pocket_model_knows_them_in(path, erased):
    """Erased people are reported people, or development people where presets are found; nobody else's role is mixed."""
    loaded = Task.load(ROOT / "suites" / "celebrity" / f"{path}.toml")
    assert set(loaded.erased.concepts) <= set(pocket.identities(erased))
    assert set(loaded.retain.concepts) <= set(pocket.identities("finetune"))
    assert all(set(loaded.finetune[name].concepts) <= set(pocket.identities("finetune")) for name in ("in", "near", "middle", "far"))
    assert set(loaded.retained.concepts) <= set(pocket.identities("retained"))
    assert set(loaded.finetune["out"].concepts) <= {entry["name"] for entry in pocket.vocabulary()["concepts"]["objects"]}
    assert loaded.anchor.concepts == (pocket.vocabulary()["generic"]["person"],)


def test_what_is_reported_was_never_looked_at():
    """The two pocket tasks share everything but the people who are erased, and the terciles of similarity to them."""
    report, development = (Task.load(ROOT / "suites" / "celebrity" / f"{name}.toml") for name in ("pocket", "pocket-development"))
    assert not set(report.erased.concepts) & set(development.erased.concepts)
    assert {name: development.finetune[name] for name in ("in", "out")} == {name: report.finetune[name] for name in ("in", "out")}
    assert replace(development, id=report.id, source=report.source, erased=report.erased, finetune=report.finetune) == report


# --- errors, claims, imports -----------------------------------------------------------------------------------------


def test_an_unknown_word_is_answered_with_the_known_ones():
    """Sorted, with a guess only where one is near."""
    assert str(unknown("colour", "gren", ["red", "green"])) == "unknown colour 'gren'; allowed: green, red. Did you mean 'green'?"
    assert str(unknown("colour", "x", [])) == "unknown colour 'x'; allowed: none."
    assert isinstance(unknown("a", "b", []), ResurgenceError)


def test_a_claim_has_one_of_four_verdicts():
    """A fifth word is refused."""
    empty = {f.name: None for f in fields(Claim)}
    with pytest.raises(SpecError, match="unknown verdict 'fine'; allowed: broken, holds, inconclusive, invalid"):
        Claim(**{**empty, "verdict": "fine"})


REPORTS = [f"reports.{path.stem}" for path in (ROOT / "reports").glob("[!_]*.py")]


MODULES = [["harness.spec"], ["harness.catalogue"], ["harness.store"], ["harness.pocket"], ["fixtures.options"], ["reports", *REPORTS]]


@pytest.mark.parametrize("modules", MODULES, ids=lambda names: names[0])
def test_nouns_options_and_reports_do_not_import_torch(modules):
    """Collection and reports start without torch."""
    assert answers(f"import sys, {', '.join(modules)}; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("path", TASKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_task_survives_being_written_down(path):
    """Every shipped task is the same after it went through JSON, as it does in a job file: what is verbatim stays so."""
    from harness import taskfile

    task = Task.load(path)
    again = taskfile.made(task.id, json.loads(json.dumps(taskfile.plain(task))))
    assert again == task
    assert [type(getattr(again, role)) for role in taskfile.GROUPS] == [type(getattr(task, role)) for role in taskfile.GROUPS]
