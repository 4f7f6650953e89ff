"""What was asked for, as cells: how many there are, and when they are no gate."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import arguments as written
from fixtures import options as cli
from fixtures.options import CLAIMS, Cell, Options
from harness import catalogue
from harness.errors import SpecError
from harness.spec import Group, Sampler, Task, Tolerance

PROMPTS = ("a {}",)
TASK = Task(
    id="made-up",
    suite="celebrity",
    source="made up",
    erased=Group(("Ada", "Bo", "Cy"), PROMPTS),
    anchor=Group(("a person",), PROMPTS),
    retain=Group(("Kim",), PROMPTS),
    finetune={"in": Group(("Flo",), PROMPTS), "out": Group(("Ox",), PROMPTS)},
    retained=Group(("Ray", "Sue"), PROMPTS),
    sampler=Sampler(2, 3.0),
    detector={"name": "classifier"},
    control="esd",
    tolerance=Tolerance(tau=0.1, alpha=0.05),
)


class Parser:
    """Pytest's option groups on top of argparse, as they are."""

    def __init__(self) -> None:
        self.inner = argparse.ArgumentParser(exit_on_error=False)

    def getgroup(self, name: str, description: str) -> Parser:
        """One group is enough."""
        return self

    def addoption(self, name: str, **how: Any) -> None:
        """An option under its own name."""
        self.inner.add_argument(name, dest=name, **how)


def parsed(*arguments: str) -> Options:
    """The command line, read and checked."""
    parser = Parser()
    written.add(parser)  # type: ignore[arg-type]  # all it needs of a pytest.Parser
    values = vars(parser.inner.parse_args(arguments))
    return Options.of(SimpleNamespace(getoption=values.__getitem__, rootpath=Path("/root")))  # type: ignore[arg-type]  # all it needs of a pytest.Config


def cells(*arguments: str) -> list[Cell]:
    """Every cell of every claim."""
    return [cell for claim in CLAIMS for cell in parsed(*arguments).cells(claim, TASK)]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_nothing_written_is_the_standard_profile() -> None:
    """The pocket model, the task's methods, LoRA on in-domain data at 50 and 200 steps, one replicate, the task's own tau and alpha, with the control."""
    assert parsed() == Options(
        model="pocket",
        candidate=None,
        methods=(),
        finetunes=("lora-in",),
        steps=(50, 200),
        task="pocket",
        profile="standard",
        tau=None,
        alpha=None,
        seeds=1,
        store=Path("/root/.store"),
        report=Path("/root/reports/out"),
        control=True,
    )


def test_a_task_brings_its_model_and_methods_unless_others_are_named() -> None:
    """`pocket` is the shipped model that the task is made for; the task's methods belong to its gate."""
    other = replace(TASK, model="pocket-ddpm", methods=("salun", "dimum"))
    assert [parsed(*written).model_of(other) for written in ([], ["--model", "pocket"], ["--model", "a/b"])] == ["pocket-ddpm", "pocket-ddpm", "a/b"]
    assert parsed().model_of(TASK) == "pocket"
    assert [cell.method for cell in parsed().cells("retained", other) if not cell.steps] == ["salun", "dimum"]
    assert {cell.method for cell in parsed("--method", "esd").cells("retained", other)} == {"esd"}
    assert {cell.method for cell in parsed("--attack", "dimra-retain").cells("withstands-dimra", other)} == {"salun", "dimum"}
    assert {cell.method for cell in parsed().ablated("forgotten", other)} == {"salun", "dimum"}
    assert parsed().deviations([other]) == []
    few = replace(other, smoke=("salun",))
    assert {cell.method for cell in parsed("--profile", "smoke").cells("forgotten", few)} == {"salun"}
    assert {cell.method for cell in parsed().cells("forgotten", few)} == {"salun", "dimum"}
    assert {cell.method for cell in parsed("--profile", "smoke", "--method", "uce").cells("forgotten", few)} == {"uce"}
    assert parsed("--method", "esd,uce,dimum").deviations([other]) == ["12 of the 27 claims of the standard profile are not selected"]


@pytest.mark.parametrize(("written", "expected"), [("s3://bucket/prefix", "s3://bucket/prefix"), ("a/folder", Path("a/folder"))])
def test_a_store_is_a_folder_or_a_url(written: str, expected: Path | str) -> None:
    """A URL keeps both its slashes."""
    assert parsed("--store", written).store == expected


def test_everything_written_is_what_is_asked(tmp_path: Path) -> None:
    """Each option reaches its field; spaces after commas do not matter, steps are sorted."""
    written = ["--model", "owner/name@1", "--method", "uce, esd:eta=3", "--finetune", "full-in, lora-out:rank=2", "--steps", "200, 10", "--task", "t"]
    written += [
        "--profile",
        "full",
        "--tau",
        "0.2",
        "--alpha",
        ".01",
        "--seeds",
        "2",
        "--finetune-seeds",
        "4",
        "--store",
        str(tmp_path),
        "--report",
        "r",
        "--no-control",
    ]
    written += ["--attack", "dimra-auxiliary, malicious-one:source=base", "--attack-steps", "30,10", "--diagnose"]
    assert parsed(*written) == Options(
        model="owner/name@1",
        candidate=None,
        methods=("uce", "esd:eta=3"),
        finetunes=("full-in", "lora-out:rank=2"),
        steps=(10, 200),
        task="t",
        profile="full",
        tau=0.2,
        alpha=0.01,
        seeds=2,
        store=tmp_path,
        report=Path("r"),
        control=False,
        attacks=("dimra-auxiliary", "malicious-one:source=base"),
        attack_steps=(10, 30),
        incidental=True,
        diagnose=True,
        finetune_seeds=4,
    )


def test_all_methods_are_all_files_of_the_folder() -> None:
    """`--method all` is what `harness/unlearning/` offers."""
    assert list(parsed("--method", "all").methods) == catalogue.names("unlearning")


@pytest.mark.parametrize(
    ("option", "text", "field", "value"),
    [
        ("--method", "esd,uce,esd", "methods", ("esd", "uce")),
        ("--method", "esd,esd:eta=3", "methods", ("esd", "esd:eta=3")),
        ("--finetune", "lora-in,full-in,lora-in", "finetunes", ("lora-in", "full-in")),
        ("--steps", "50,100,50", "steps", (50, 100)),
        ("--steps", "50,050", "steps", (50,)),
    ],
)
def test_what_is_named_twice_is_asked_once(option: str, text: str, field: str, value: object) -> None:
    """A repetition asks nothing new; the same method with other fields is another method."""
    assert getattr(parsed(option, text), field) == value


@pytest.mark.parametrize("option", ["--method", "--finetune", "--steps"])
@pytest.mark.parametrize("text", ["", ",", "{},", ",{}", "{},,{}", "{}, ,{}"])
def test_an_empty_entry_is_refused(option: str, text: str) -> None:
    """A stray comma may hide a name that was meant, so it is an error and not skipped."""
    name = {"--method": "esd", "--finetune": "lora-in", "--steps": "50"}[option]
    with pytest.raises(SpecError, match=f"{option} has an empty entry"):
        parsed(option, text.replace("{}", name))


@pytest.mark.parametrize("option", ["--steps", "--seeds", "--finetune-seeds"])
@pytest.mark.parametrize("text", ["0", "00", "x", "-1", "1.5", "1e3", "+5", "\N{SUPERSCRIPT TWO}", "50;100"])
def test_counts_are_whole_numbers_from_one(option: str, text: str) -> None:
    """Zero, signs, fractions, letters and a superscript two, which Python calls a digit but not a number, are refused by name."""
    with pytest.raises(SpecError, match=f"{option} takes whole numbers from 1"):
        parsed(f"{option}={text}")


def test_no_number_is_not_the_default() -> None:
    """`--seeds ""`, as from an unset variable of a shell, is refused and not taken for the profile's own number."""
    with pytest.raises(SpecError, match="--seeds takes whole numbers from 1, got ''"):
        parsed("--seeds", "")


@pytest.mark.parametrize(
    ("option", "text", "field"), [("--method", "esd:eta=3:seed=1", "seed"), *(("--finetune", f"lora-in:{x}=1", x) for x in ("seed", "steps", "data"))]
)
def test_what_the_run_decides_is_no_field(option: str, text: str, field: str) -> None:
    """A written seed would make all replicates one, written data would train on another set than the claim names, written steps would be ignored."""
    with pytest.raises(SpecError, match=f"'{field}'"):
        parsed(option, text)


@pytest.mark.parametrize("option", ["--tau", "--alpha"])
@pytest.mark.parametrize("text", ["0", "1", "-0.1", "1.5", "nan", "inf", "x", ""])
def test_shares_lie_strictly_between_0_and_1(option: str, text: str) -> None:
    """A tolerance of 0 could never be shown and one of 1 promises nothing."""
    with pytest.raises(SpecError, match=f"{option} takes a number strictly between 0 and 1, got '{text}'"):
        parsed(f"{option}={text}")


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--profile", "standart", "allowed: full, smoke, standard. Did you mean 'standard'"),
        ("--method", "esf", "unknown unlearning name 'esf'.*Did you mean 'esd'"),
        ("--method", "esd,all", "unknown unlearning name 'all'"),
        ("--method", "esd:eta", "cannot read 'esd:eta'"),
        ("--finetune", "loar-in", "unknown finetuning name 'loar'.*Did you mean 'lora'"),
        ("--finetune", "lora", "must be a kind and a data set, such as lora-in; kinds: full, lora"),
        ("--finetune", "lora-", "must be a kind and a data set"),
        ("--candidate", "/nowhere/at/all", "'/nowhere/at/all' does not exist"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_before_any_work(option: str, text: str, message: str) -> None:
    """The error says what exists and guesses what was meant."""
    with pytest.raises(SpecError, match=message):
        parsed(option, text)


def test_a_candidate_is_its_own_method(tmp_path: Path) -> None:
    """A finished model is not made again: it takes the place of the methods, and both together contradict each other."""
    assert parsed("--candidate", str(tmp_path)).methods == ("candidate",)
    with pytest.raises(SpecError, match="--candidate brings a finished model, --method makes one"):
        parsed("--candidate", str(tmp_path), "--method", "esd")


# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "counts"),
    [
        ("smoke", {"instruments": 2, "forgotten": 3 * 2, "retained": 3 * (1 + 1), "stays-forgotten": 3 * 1 * 2}),
        ("standard", {"instruments": 3, "forgotten": 3 * 3, "retained": 3 * (1 + 2), "stays-forgotten": 3 * 2 * 3}),
        (
            "full",
            {
                "instruments": 3,
                "forgotten": 3 * 3 * 3,
                "retained": 3 * 3 * (1 + 27),
                "stays-forgotten": 3 * 3 * 27 * 3,
                "stays-out": 3 * 3 * 27 * 3,
                "withstands-dimra": 3 * 3 * 2 * 3,
            },
        ),
    ],
)
def test_the_cells_of_each_profile_by_hand(profile: str, counts: dict[str, int]) -> None:
    """Three people, three methods. smoke: two people, one fine-tune at one step. standard: one fine-tune at two steps. full: three replicates of
    three fine-tunes, three times each, at three steps. Instruments once a person; forgotten once a model and person; retained once a snapshot, the
    unlearned one included; stays-forgotten once a fine-tuned snapshot and person; full also asks as often whether they appear unasked, and for two
    DiMRA attacks, once a model, attack and person.
    """
    found = cells("--profile", profile)
    assert Counter(cell.claim for cell in found) == counts
    assert len(found) == sum(counts.values()) == {"smoke": 20, "standard": 39, "full": 1794}[profile]


@settings(max_examples=25, deadline=None)
@given(
    methods=st.lists(st.sampled_from(["esd", "uce", "esd:eta=3"]), min_size=1, max_size=3),
    finetunes=st.lists(st.sampled_from(["lora-in", "full-in", "lora-in:rank=2"]), min_size=1, max_size=3),
    steps=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    seeds=st.integers(1, 2),
    tunes=st.integers(1, 2),
)
def test_no_two_cells_share_an_id(methods: list[str], finetunes: list[str], steps: list[int], seeds: int, tunes: int) -> None:
    """An id names one cell among all claims, whatever was written twice: the controller looks for cells by id."""
    written = ["--method", ",".join(methods), "--finetune", ",".join(finetunes), "--steps", ",".join(map(str, steps))]
    found = cells(*written, "--seeds", str(seeds), "--finetune-seeds", str(tunes))
    assert len({str(cell) for cell in found}) == len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("named", "id"),
    [
        (Cell("instruments", "", None, 0, "Ada"), "Ada"),
        (Cell("forgotten", "esd", None, 0, "Ada"), "esd-unlearned-Ada"),
        (Cell("forgotten", "esd", None, 0, "Ada", 2), "esd-unlearned-Ada-seed2"),
        (Cell("retained", "esd", "lora-in", 50, "2 retained concepts"), "esd-lora-in-50-2 retained concepts"),
        (Cell("stays-forgotten", "esd:eta=3", "lora-in", 50, "Ada", 1), "esd:eta=3-lora-in-50-Ada-seed1"),
        (Cell("stays-forgotten", "esd", "lora-in", 50, "Ada", 1, tune=2), "esd-lora-in-50-Ada-seed1-finetune2"),
    ],
)
def test_ids_as_they_are_read(named: Cell, id: str) -> None:
    """Method, what was done to it, concept, and the replicate from the second on."""
    assert str(named) == id


def test_a_method_runs_from_unlearned_to_the_longest_fine_tune() -> None:
    """Snapshots come in the order in which they can be made, replicate by replicate and method by method."""
    found = parsed("--method", "uce,esd", "--steps", "200,50", "--seeds", "2").cells("retained", TASK)
    assert [(c.seed, c.method, c.finetune, c.steps) for c in found] == [
        (seed, method, finetune, steps) for seed in (0, 1) for method in ("uce", "esd") for finetune, steps in ((None, 0), ("lora-in", 50), ("lora-in", 200))
    ]
    assert {c.concept for c in found} == {"2 retained concepts"}


def test_one_unlearned_model_is_fine_tuned_several_times() -> None:
    """`--finetune-seeds 2`: the unlearned model is one, asked once; each of its fine-tunes is asked at every step, with a seed that no replicate has."""
    written = ["--method", "esd", "--steps", "50,200", "--seeds", "2", "--finetune-seeds", "2"]
    found = parsed(*written).cells("retained", TASK)
    tuned = [(None, 0, 0), ("lora-in", 50, 0), ("lora-in", 200, 0), ("lora-in", 50, 1), ("lora-in", 200, 1)]
    assert [(c.seed, c.finetune, c.steps, c.tune) for c in found] == [(seed, *each) for seed in (0, 1) for each in tuned]
    assert [c.finetune_seed for c in found if c.steps == 50] == [0, 1000, 1, 1001]
    assert {c.tune for c in parsed(*written).cells("forgotten", TASK)} == {0}
    once = {str(c) for c in cells(*written[:-2])}
    assert once < {str(c) for c in cells(*written)}  # what was asked without them is asked under the same ids


def test_an_unknown_claim_is_refused_with_a_guess() -> None:
    """A suite whose marker is misspelt hears which claims there are."""
    with pytest.raises(SpecError, match=r"unknown claim 'forgoten'; allowed: .*Did you mean 'forgotten'"):
        parsed().cells("forgoten", TASK)


def test_smoke_asks_about_the_first_two_people_only() -> None:
    """The task that is measured has the first two, and a tau that was written; every other promise is the task's."""
    smoke, standard = (parsed("--profile", name, "--tau", "0.3").applied(TASK) for name in ("smoke", "standard"))
    assert smoke.erased.concepts == ("Ada", "Bo")
    assert standard == replace(TASK, tolerance=replace(TASK.tolerance, tau=0.3))
    assert smoke == replace(standard, erased=smoke.erased)


# --- attacks ----------------------------------------------------------------------------------------------------------

EVERY = "dimra-retain,malicious-one,malicious-several,malicious-clean,unlearndiffatk"


def attacked(*arguments: str, task: Task = TASK) -> list[Cell]:
    """The cells that attacks add."""
    return [cell for claim in cli.ATTACKED for cell in parsed(*arguments).cells(claim, task)]


def test_no_attack_no_claim() -> None:
    """The standard gate has none of them: they are added by option."""
    assert attacked() == []


def test_the_cells_of_each_attack_by_hand() -> None:
    """Two methods, three people. DiMRA: one cell a person over the whole grid; malicious: one a person and step for each of two sets; CLEAN: one a
    model at its last step; prompts: one a person. Self-destruction is asked of meta-unlearning only.
    """
    found = Counter((cell.claim, cell.method) for cell in attacked("--attack", EVERY, "--method", "esd,meta-esd"))
    for method in ("esd", "meta-esd"):
        assert found["withstands-dimra", method] == 3
        assert found["withstands-malicious", method] == 2 * 4 * 3
        assert found["withstands-prompts", method] == 3
        assert found["survives-clean", method] == 1
    assert found["self-destructs", "meta-esd"] == 2
    assert sum(found.values()) == 2 * (3 + 24 + 3 + 1) + 2


def test_the_alternative_is_asked_of_methods_that_have_one() -> None:
    """UCE and DiMUM map to the task's anchor, ESD to nothing; a task that names no label for it asks nobody."""
    arguments = ["--attack", "dimra-retain,dimra-auxiliary", "--method", "esd,uce,meta-dimum"]
    named = replace(TASK, alternative="none")
    found = [cell for cell in attacked(*arguments, task=named) if cell.claim == "keeps-alternative"]
    assert Counter(cell.method for cell in found) == Counter({"uce": 6, "meta-dimum": 6})
    assert not [cell for cell in attacked(*arguments) if cell.claim == "keeps-alternative"]


def test_no_two_cells_of_attacks_share_an_id() -> None:
    """Also where two claims look at the same model and person."""
    found = attacked(
        "--attack", f"{EVERY},dimra-auxiliary,dimra-retain:lr=0.1", "--method", "uce,meta-uce", "--seeds", "2", task=replace(TASK, alternative="none")
    )
    found += cells("--method", "uce,meta-uce")
    assert len({str(cell) for cell in found}) == len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("named", "id"),
    [
        (Cell("withstands-dimra", "esd", None, 400, "Ada", 0, "dimra-retain"), "esd-dimra-retain-400-Ada"),
        (Cell("keeps-alternative", "uce", None, 400, "Ada", 1, "dimra-retain"), "uce-dimra-retain-400-alternative-Ada-seed1"),
        (Cell("withstands-prompts", "esd", None, 0, "Ada", 0, "unlearndiffatk"), "esd-unlearndiffatk-Ada"),
    ],
)
def test_ids_of_attacks_as_they_are_read(named: Cell, id: str) -> None:
    """The attack stands where a fine-tune would."""
    assert str(named) == id


def test_the_grid_is_the_attacks_own_or_the_one_that_is_written() -> None:
    """DiMRA and malicious fine-tuning have their own; `--attack-steps` is both's; an attack on prompts has no steps."""
    own, written = parsed(), parsed("--attack-steps", "7,3")
    assert own.grid("dimra-retain:lr=1") == (50, 100, 200, 400)
    assert own.grid("malicious-one") == (50, 100, 200, 300)
    assert (written.grid("dimra"), written.grid("malicious-one"), written.grid("unlearndiffatk")) == ((3, 7), (3, 7), (0,))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["--attack", "dimro-retain"], "unknown relearning name 'dimro'.*Did you mean 'dimra'"),
        (["--attack", "dimra-retain,"], "--attack has an empty entry"),
        (["--attack", "dimra-retain:steps=9"], "'steps'"),
        (["--attack", "malicious:data=one"], "'data'"),
        (["--attack", "dimra:seed=1"], "'seed'"),
        (["--attack-steps", "0"], "--attack-steps takes whole numbers from 1"),
        (["--method", "meta-edd"], "unknown unlearning name 'edd'"),
        (["--method", "meta-esd:seed=1"], "'seed'"),
        (["--method", "meta-esd:base.seed=1"], "'base.seed'"),
    ],
)
def test_an_attack_that_cannot_be_meant_is_refused(written: list[str], message: str) -> None:
    """Unknown names, empty entries and fields that other options decide."""
    with pytest.raises(SpecError, match=message):
        parsed(*written)


def test_attacks_more_are_a_gate_and_no_substitute() -> None:
    """The standard claims and some attacks are a gate; attacks in place of a fine-tune are not."""
    assert parsed("--attack", EVERY).deviations([TASK]) == []
    assert parsed("--attack", EVERY, "--steps", "50").deviations([TASK]) == ["12 of the 39 claims of the standard profile are not selected"]


# --- is it a gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [
        [],
        ["--profile", "full"],
        ["--method", "all"],
        ["--method", "dimum,uce,esd,esd:eta=3"],
        ["--finetune", "full-in,lora-in"],
        ["--steps", "10,50,200,400"],
        ["--seeds", "3"],
        ["--finetune-seeds", "3"],
        ["--tau", "0.1", "--alpha", "0.05"],
        ["--store", "elsewhere", "--report", "elsewhere"],
    ],
)
def test_the_standard_profile_and_more_is_a_gate(written: list[str]) -> None:
    """A superset of the standard claims deviates in nothing, nor do the task's own tau and alpha written out."""
    assert parsed(*written).deviations([TASK]) == []


@pytest.mark.parametrize(
    ("written", "reasons"),
    [
        (["--tau", "0.2"], ["--tau 0.2 differs from the task's own 0.1"]),
        (["--tau", "0.05"], ["--tau 0.05 differs from the task's own 0.1"]),
        (["--alpha", "0.1"], ["--alpha 0.1 differs from the task's own 0.05"]),
        (["--no-control"], ["--no-control: nothing shows that this fine-tune can bring a concept back"]),
        (["--steps", "50"], ["12 of the 39 claims of the standard profile are not selected"]),
        (["--steps", "50", "--seeds", "3", "--finetune-seeds", "3"], ["12 of the 39 claims"]),
        (["--method", "esd,uce"], ["12 of the 39 claims"]),
        (["--method", "esd:eta=3,uce,dimum"], ["12 of the 39 claims"]),
        (["--finetune", "full-in"], ["24 of the 39 claims"]),
        (["--finetune", "lora-in:rank=2"], ["24 of the 39 claims"]),
        (["--profile", "smoke"], ["28 of the 39 claims"]),
        (["--profile", "smoke", "--steps", "50,200"], ["10 of the 39 claims"]),
        (["--tau", "0.2", "--no-control"], ["--tau 0.2 differs", "--no-control: nothing"]),
    ],
)
def test_less_or_other_than_the_standard_profile_is_no_gate(written: list[str], reasons: list[str]) -> None:
    """Of 3 + 9 + 9 + 18 = 39 claims: without 200 steps 3 retained and 9 stays are missing; without a method 3 forgotten, 3 retained, 6 stays; without
    the fine-tune 6 retained and 18 stays; smoke keeps 2 instruments, 6 forgotten and 3 retained of unlearned models, and at 50,200 steps all
    9 retained and 12 stays too.
    """
    found = parsed(*written).deviations([TASK])
    assert len(found) == len(reasons)
    assert all(reason in text for reason, text in zip(reasons, found, strict=True))


def test_of_several_tasks_each_says_what_is_left_out() -> None:
    """The same number means another thing of another task; tau and alpha are said once."""
    left_out = "12 of the 39 claims of the standard profile are not selected"
    found = parsed("--steps", "50", "--tau", "0.2").deviations([TASK, replace(TASK, id="other")])
    assert found == ["--tau 0.2 differs from the task's own 0.1", f"celebrity/{TASK.id}: {left_out}", f"celebrity/other: {left_out}"]


def test_a_candidate_is_held_against_its_own_claims(tmp_path: Path) -> None:
    """One model instead of three: 3 + 3 + 3 + 6 = 15 claims; all of them are a gate, without the 200 steps (1 + 3 claims) they are not."""
    candidate = ["--candidate", str(tmp_path)]
    assert len(cells(*candidate)) == 15
    assert parsed(*candidate).deviations([TASK]) == []
    assert parsed(*candidate, "--steps", "50").deviations([TASK]) == ["4 of the 15 claims of the standard profile are not selected"]


def test_deviations_name_each_reason_once() -> None:
    """Two tasks with the same promises do not say the same thing twice; a task with its own tau says its own."""
    other = replace(TASK, id="other", tolerance=replace(TASK.tolerance, tau=0.3))
    assert parsed("--tau", "0.2").deviations([TASK, TASK, other]) == ["--tau 0.2 differs from the task's own 0.1", "--tau 0.2 differs from the task's own 0.3"]
