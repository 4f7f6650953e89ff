"""The folder is the registry: what the command line names becomes a stage, or an error that says what would do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import catalogue
from harness.catalogue import Spec
from harness.errors import SpecError

CALM = settings(deadline=None)  # a busy machine is no failure
ROOT = Path(__file__).parents[1]
WORD = st.text("abcdefghijklmnopqrstuvwxyz_-.0123456789", min_size=1)


@dataclass(frozen=True)
class Everything:
    """A stage with a field of every type that stages have."""

    count: int = 1
    rate: float = 0.5
    name: str = "plain"
    loud: bool = False
    kind: Literal["soft", "hard"] = "soft"
    level: Literal[1, 2] = 1
    guide: str | None = None

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("erased",)


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """`everything` as the name of an unlearning method."""
    monkeypatch.setattr(catalogue, "find", lambda kind, name: Everything)


def made(text: str, presets: dict[str, Any] | None = None, **given: Any) -> Everything:
    """The stage that a text on the command line amounts to."""
    result: Everything = catalogue.make("unlearning", Spec.parse(text), presets or {}, **given)
    return result


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "fields"),
    [
        ("esd", "esd", ()),
        ("esd:trains=u:eta=3", "esd", (("trains", "u"), ("eta", "3"))),
        ("  esd:eta=3 ", "esd", (("eta", "3"),)),
        ("uce:guide=", "uce", (("guide", ""),)),
        ("uce:guide=a=b", "uce", (("guide", "a=b"),)),
        ("uce:guide=a person", "uce", (("guide", "a person"),)),
    ],
)
def test_a_name_and_its_fields(text: str, name: str, fields: tuple[tuple[str, str], ...]) -> None:
    """`name:field=value:field=value`; only the first `=` of a part separates, a value may be empty or hold spaces."""
    assert Spec.parse(text) == Spec(name, fields)


@pytest.mark.parametrize("text", ["", "   ", ":eta=3", "esd:", "esd:eta", "esd::eta=3", "esd:eta=3:", "esd:eta:3", "esd:=3"])
def test_what_cannot_be_read_is_refused_with_an_example(text: str) -> None:
    """A missing name, a part without `=` and one without a field before it are errors that show how to write it."""
    with pytest.raises(SpecError, match="for example esd:trains=u:eta=3"):
        Spec.parse(text)


def test_a_field_that_is_written_twice_is_refused() -> None:
    """Which of two values was meant nobody can say, and the name of the model would show both."""
    with pytest.raises(SpecError, match="'eta' twice"):
        Spec.parse("esd:eta=1:trains=u:eta=2")


@CALM
@given(name=WORD, fields=st.dictionaries(WORD, WORD).map(lambda each: tuple(each.items())))
def test_reading_what_was_written_gives_it_back(name: str, fields: tuple[tuple[str, str], ...]) -> None:
    """`parse` undoes `str`."""
    assert Spec.parse(str(Spec(name, fields))) == Spec(name, fields)


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unlearning", "finetuning", "detection"])
def test_the_folder_is_the_registry(kind: str) -> None:
    """Every module of the folder is a name, unless it starts with an underscore; nothing else is."""
    modules = {path.stem for path in (ROOT / "harness" / kind).iterdir() if path.suffix == ".py"}
    assert catalogue.names(kind) == sorted(name for name in modules if not name.startswith("_"))
    assert catalogue.names(kind)


def test_the_methods_of_the_standard_profile_are_there() -> None:
    """ESD, UCE and DiMUM unlearn; LoRA and full fine-tune; their helper is no name."""
    assert {"esd", "uce", "dimum"} <= set(catalogue.names("unlearning"))
    assert catalogue.names("finetuning") == ["full", "lora"]


@pytest.mark.parametrize(
    ("kind", "name", "guess"),
    [("unlearning", "eds", "esd"), ("unlearning", "dimun", "dimum"), ("finetuning", "loar", "lora"), ("detection", "clasifier", "classifier")],
)
def test_an_unknown_name_lists_the_folder_and_guesses(kind: str, name: str, guess: str) -> None:
    """A typing error costs one line of reading, and no run."""
    with pytest.raises(SpecError) as caught:
        catalogue.find(kind, name)
    message = str(caught.value)
    assert f"unknown {kind} name '{name}'; allowed: {', '.join(catalogue.names(kind))}." in message
    assert message.endswith(f"Did you mean '{guess}'?")


def test_a_name_that_resembles_nothing_gets_no_guess() -> None:
    """No guess is better than a wild one."""
    with pytest.raises(SpecError, match=r"allowed: .*\.$"):
        catalogue.check("unlearning", "zzzzzz")


@pytest.mark.parametrize("kind", ["unlearning", "finetuning"])
def test_every_name_is_a_stage(kind: str) -> None:
    """Each module has the folder's class: a stage that can be made from its name alone."""
    for name in catalogue.names(kind):
        stage = catalogue.make(kind, Spec(name), {})
        assert isinstance(stage, catalogue.find(kind, name))
        assert set(catalogue.fields(stage)) >= {"seed"}


def test_names_are_known_without_torch() -> None:
    """Collection must not import torch: listing, checking and reading options do without."""
    code = "import sys, fixtures.options, harness.catalogue as c; c.check('unlearning', 'esd'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_reading_the_store_loads_no_model_library() -> None:
    """A warm run needs names, addresses and scores: what only draws, trains or sees is loaded when it does."""
    heavy = "{'diffusers', 'transformers', 'peft', 'timm', 'torchvision', 'scipy.stats'}"
    make = "import sys, fixtures.claims, fixtures.lab as l, fixtures.stages as s; from harness.detection.classifier import Detector; Detector('pocket')"
    stages = "[s.unlearning(m, {}) for m in ('esd', 'uce', 'dimum')]; s.finetuning('lora-in', {})"
    code = f"{make}; {stages}; print(sorted({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.stdout == "[]\n", ran.stdout + ran.stderr[-500:]


# --- making -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("count", "12", 12),
        ("count", "-3", -3),
        ("rate", "3", 3.0),
        ("rate", "1e-4", 1e-4),
        ("name", "x-strict", "x-strict"),
        ("name", "", ""),
        ("loud", "true", True),
        ("loud", "True", True),
        ("loud", "false", False),
        ("kind", "hard", "hard"),
        ("level", "2", 2),
        ("guide", "a person", "a person"),
        ("guide", "", ""),
    ],
)
def test_every_type_is_converted(field: str, text: str, value: object) -> None:
    """A field gets a value of its own type: `rate=3` is 3.0, `loud=false` is False and not a true word, `level=2` is a number."""
    result = getattr(made(f"everything:{field}={text}"), field)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count=1.5", "everything:count must be a whole number, got '1.5'"),
        ("count=", "everything:count must be a whole number, got ''"),
        ("rate=fast", "everything:rate must be a number, got 'fast'"),
        ("rate=nan", "everything:rate must be a number, got 'nan'"),
        ("rate=inf", "everything:rate must be a number, got 'inf'"),
        ("loud=yes", "everything:loud must be true or false, got 'yes'"),
        ("loud=1", "everything:loud must be true or false, got '1'"),
        ("kind=medium", "everything:kind must be soft or hard, got 'medium'"),
        ("level=3", "everything:level must be 1 or 2, got '3'"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(text: str, message: str) -> None:
    """The error names the stage and the field, what may stand there and what was got; nan and infinity have no address in JSON."""
    with pytest.raises(SpecError) as caught:
        made(f"everything:{text}")
    assert str(caught.value) == message


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(("field", "guess"), [("cuont", "count"), ("kinds", "kind")])
def test_an_unknown_field_lists_the_fields_and_guesses(field: str, guess: str) -> None:
    """All seven fields and nothing that is no field."""
    with pytest.raises(SpecError) as caught:
        made(f"everything:{field}=1")
    assert str(caught.value) == f"unknown field of 'everything' '{field}'; allowed: count, guide, kind, level, loud, name, rate. Did you mean '{guess}'?"


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("field", ["version", "reads"])
def test_what_belongs_to_the_class_is_no_field(field: str) -> None:
    """A ClassVar is not configuration: it cannot be set from the command line."""
    with pytest.raises(SpecError, match=f"unknown field of 'everything' '{field}'"):
        made(f"everything:{field}=1")


@pytest.mark.usefixtures("everything")
def test_what_is_written_wins_over_the_run_over_the_presets_over_the_class() -> None:
    """Four layers for four fields: the class has count 1, presets set 2, the run 3, the spec 4; each layer yields only where a later one speaks."""
    presets = {
        "unlearning": {"everything": {"count": 2, "rate": 2.0, "name": "two"}, "other": {"kind": "hard"}},
        "finetuning": {"everything": {"kind": "hard"}},
    }
    assert made("everything") == Everything()
    assert made("everything", presets) == Everything(count=2, rate=2.0, name="two")
    assert made("everything", presets, count=3, rate=3.0) == Everything(count=3, rate=3.0, name="two")
    assert made("everything:count=4", presets, count=3, rate=3.0) == Everything(count=4, rate=3.0, name="two")


def test_the_example_of_the_error_message_works() -> None:
    """`esd:trains=u:eta=3` is ESD-u-3; a guide is a word; what UCE trains cannot be chosen."""
    esd = catalogue.make("unlearning", Spec.parse("esd:trains=u:eta=3"), {})
    assert (esd.trains, esd.eta) == ("u", 3.0)
    assert catalogue.make("unlearning", Spec.parse("uce:guide=someone:tokens=last"), {}).guide == "someone"
    with pytest.raises(SpecError, match="unknown field of 'uce' 'trains'"):
        catalogue.make("unlearning", Spec.parse("uce:trains=u"), {})
    with pytest.raises(SpecError, match="uce:tokens must be tail or last, got 'head'"):
        catalogue.make("unlearning", Spec.parse("uce:tokens=head"), {})


def test_the_fields_of_a_stage_are_its_configuration() -> None:
    """For reports: every field with its value, no class variable."""
    assert catalogue.fields(Everything(count=4)) == {"count": 4, "rate": 0.5, "name": "plain", "loud": False, "kind": "soft", "level": 1, "guide": None}
