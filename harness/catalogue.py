"""Names on the command line to stages: the folder is the registry. No torch until a class is asked for."""

from __future__ import annotations

import dataclasses
import importlib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import SpecError, unknown

CLASSES = {"unlearning": "Method", "finetuning": "Finetune", "relearning": "Attack", "meta": "Method", "detection": "Detector"}
KINDS = {"text-to-image": ("stable-diffusion", "sdxl")}  # names for several families


@dataclass(frozen=True)
class Spec:
    """`esd:trains=u:eta=3` taken apart: a name and its fields as they were written."""

    name: str
    fields: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read `name:field=value:field=value`."""
        name, *parts = text.strip().split(":")
        if not name or not all(part.find("=") > 0 for part in parts):
            raise SpecError(f"cannot read '{text}'; write name:field=value:field=value, for example esd:trains=u:eta=3")
        fields = tuple(tuple(part.split("=", 1)) for part in parts)
        if doubled := [k for k, _ in fields if [k for k, _ in fields].count(k) > 1]:
            raise SpecError(f"'{text}' gives '{doubled[0]}' twice; which is meant?")
        return cls(name, fields)  # type: ignore[arg-type]  # every part holds one '='

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{k}={v}" for k, v in self.fields)])


def names(kind: str) -> list[str]:
    """What a folder of the harness offers."""
    return sorted(p.stem for p in (Path(__file__).parent / kind).glob("[!_]*.py"))


def check(kind: str, name: str) -> str:
    """The name, if the folder has it; otherwise an error that lists the folder and guesses."""
    if name not in names(kind):
        raise unknown(f"{kind} name", name, names(kind))
    return name


def find(kind: str, name: str) -> type[Any]:
    """The class behind a name: `find("unlearning", "esd")` is `harness.unlearning.esd.Method`."""
    module = importlib.import_module(f"harness.{kind}.{check(kind, name)}")
    return typing.cast("type[Any]", getattr(module, CLASSES[kind]))


def make(kind: str, spec: Spec, presets: Mapping[str, Any], **given: Any) -> Any:
    """The stage: class defaults, then the model's presets, then `given`, then what the spec says."""
    cls = find(kind, spec.name)
    found = typing.get_type_hints(cls)
    hints = {f.name: found[f.name] for f in dataclasses.fields(cls)}  # not __dataclass_fields__, which holds ClassVars too
    written = {}
    for name, text in spec.fields:
        if name not in hints:
            raise unknown(f"field of '{spec.name}'", name, hints)
        written[name] = _value(text, hints[name], f"{spec.name}:{name}")
    return cls(**{**presets.get(kind, {}).get(spec.name, {}), **given, **written})


def _value(text: str, hint: Any, where: str) -> Any:
    """`text` as a value of the field's type."""
    allowed = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    options = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    if isinstance(hint, types.UnionType):  # `str | None`: what is written is the first
        hint = typing.get_args(hint)[0]
    try:
        if options:
            return {str(option): option for option in options}[text]
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        value = hint(text)
        if hint is float and not math.isfinite(value):
            raise ValueError  # no address in JSON
        return value
    except (ValueError, KeyError):
        raise SpecError(f"{where} must be {' or '.join(map(str, options)) or allowed.get(hint, hint)}, got '{text}'") from None


def families(cls: type[Any]) -> tuple[str, ...]:
    """The families of models that a stage runs on; one that says nothing is for text-to-image models, of both families."""
    return tuple(getattr(cls, "families", ("text-to-image",)))


def runs_on(cls: type[Any], family: str) -> bool:
    """Whether a stage runs on models of a family."""
    return any(family in (each, *KINDS.get(each, ())) for each in families(cls))


def fits(stage: Any, family: str) -> None:
    """SpecError, with what would do instead, where a stage does not run on models of this family."""
    if runs_on(type(stage), family):
        return
    _, kind, name = f"..{type(stage).__module__}".rsplit(".", 2)
    others = [each for each in names(kind) if runs_on(find(kind, each), family)] if kind in CLASSES else []
    runs = " and ".join(families(type(stage)))
    raise SpecError(f"'{name}' runs on {runs} models and this one is {family}; {kind} that runs on it: {', '.join(others) or 'none'}")


def passes(stage: Any, task: Any, steps: int) -> int:
    """UNet passes of so many steps of a stage (a batch of 8 is 8), as its own `passes` says; else one an image of each batch.

    `task` is what the stage sees. What happens once, before the steps, is counted too.
    """
    own = getattr(stage, "passes", None)
    return int(own(task, steps)) if own else steps * getattr(stage, "batch", 0)


def fields(stage: Any) -> dict[str, Any]:
    """A stage's fields, for reports."""
    return {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage)}
