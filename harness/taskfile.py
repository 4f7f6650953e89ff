"""Task files (TOML), and the files of prompts that they name. No torch in here."""

from __future__ import annotations

import csv
import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.detection._rule import Rule
from harness.errors import SpecError, unknown
from harness.spec import BLOCKS, Group, Quality, Task, Verbatim, canonical

GROUPS = ("erased", "anchor", "retain", "retained")
EYE: Mapping[str, Any] = {"name": str, "rule": str, "names": Mapping[str, str]}  # keys of a detector's table that are not the detector's own
SHAPES = {str: "a text in quotes", int: "a whole number", float: "a number", tuple: 'a list of texts, such as ["cat"]', Mapping: "a table"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tiff")


def read(path: Path) -> Task:
    """The task in a file; the file's name is its id. `like = "other"` starts from that file beside it and replaces whole keys."""
    try:
        task = made(path.stem, _parsed(path))
        return dataclasses.replace(task, asked=str(path.parent / task.asked)) if task.asked else task
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, SpecError) as error:
        raise SpecError(f"task file {path.name}: {error}") from error


def prompts_in(file: str, source: str) -> tuple[str, ...]:
    """The column `prompt` of a CSV file, in its order, each prompt once: published files repeat some, and the same prompt is the same image."""
    path = Path(file)
    if not path.is_file():
        raise SpecError(f"this task is measured on prompts that are not shipped: put them at {path}, a CSV file with a column 'prompt' ({source})")
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = [(number, row) for number, row in enumerate(csv.reader(lines), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"'{path}' is no readable CSV file: {error}") from error
    while rows and not "".join(rows[-1][1]).strip():  # what a spreadsheet leaves below its table
        rows.pop()
    head = rows[0][1] if rows else []
    if "prompt" not in head or not rows[1:]:
        raise SpecError(f"'{path}' needs a column 'prompt' and at least one row below its name; it has {', '.join(head) or 'no rows'}")
    column = head.index("prompt")
    prompts = {number: "".join(row[column : column + 1]).strip() for number, row in rows[1:]}
    if blank := [number for number, prompt in prompts.items() if not prompt]:
        raise SpecError(f"'{path}' has no prompt in row {blank[0]}; every row must have one: write it there, or delete the row")
    if torn := [number for number, row in rows[1:] if len(row) > len(head)]:
        raise SpecError(f"'{path}' has more cells in row {torn[0]} than its {len(head)} columns; put prompts that contain commas in quotes")
    return tuple(dict.fromkeys(prompts.values()))


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())


def real_images(task: Task, asked: Quality) -> list[Path]:
    """The files of the reference of `asked`, none where it names no folder; SpecError where they are not there."""
    if not asked.reference:
        return []
    folders = dict.fromkeys(Path(asked.reference.replace("{}", concept)) for concept in task.retained.concepts)
    found = {folder: pictures_in(folder) for folder in folders}
    if empty := [folder for folder, files in found.items() if not files]:
        raise SpecError(f"no PNG or JPEG in '{empty[0]}', a reference of [quality]; put real images there ({task.source}), or leave the key out")
    if (count := sum(map(len, found.values()))) < 2 * BLOCKS:
        raise SpecError(f"a distance needs at least {2 * BLOCKS} images on each side, got {count} in '{asked.reference}', the reference of [quality]; add more")
    return [file for files in found.values() for file in files]


def _parsed(path: Path, nested: bool = False) -> dict[str, Any]:
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    if (other := data.pop("like", None)) is None:
        return data
    if not (parent := path.parent / f"{other}.toml").is_file() or nested:
        raise SpecError(f"'like = \"{other}\"' must name a task file beside this one that is like no other")
    return {**_parsed(parent, nested=True), **data}


def plain(task: Task) -> dict[str, Any]:
    """A task as the tables that `made` reads."""
    data: dict[str, Any] = canonical(task)
    groups = [(data, name, getattr(task, name)) for name in (*GROUPS, "crossed")] + [(data["finetune"], *pair) for pair in task.finetune.items()]
    for place, name, group in groups:
        if isinstance(group, Verbatim):
            place[name]["verbatim"] = place[name].pop("prompts")
    return {name: value for name, value in data.items() if name != "id" and value is not None}


def made(id: str, data: dict[str, Any]) -> Task:
    """The task of a file's tables; unknown, missing or ill-formed keys are SpecErrors."""
    if "finetune" in data and (not isinstance(data["finetune"], dict) or not data["finetune"]):
        raise SpecError("[finetune] needs at least one set of concepts, such as [finetune.in]")
    if data.get("methods") == []:  # nothing would be measured; `smoke` falls back on `methods`
        raise SpecError('methods must be a list of at least one method, such as ["esd"], got []')
    task: Task = _build(Task, data, id=id)
    for where, table in {"detector": task.detector, **{f"detectors.{role}": table for role, table in task.detectors.items()}}.items():
        if "name" not in table:
            raise SpecError(f"[{where}] lacks name, which detector it is")
        for name in [name for name in EYE if name in table]:
            _shaped(table[name], EYE[name], f"{where}.{name}")
        Rule.parse(table.get("rule", "top-1"))
    return task


def _build(kind: type[Any], data: Any, where: str = "", **given: Any) -> Any:
    """`kind(**given, **data)`, its fields as they are annotated. Prompts given as `verbatim` do not hold the concept's name."""
    table = f"[{where}] " if where else ""
    if not isinstance(data, dict):
        raise SpecError(f"{table}must be a table, got {data!r}")
    verbatim = kind is Group and "verbatim" in data and "prompts" not in data
    fields = {"verbatim" if verbatim and f.name == "prompts" else f.name: f for f in dataclasses.fields(kind) if f.name not in given}
    for name in data:
        if name not in fields:
            raise unknown(f"key in [{where}]" if where else "key", name, fields)
    if lacking := [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING and name not in data]:
        raise SpecError(f"{table}lacks {' and '.join(lacking)}")
    hints = typing.get_type_hints(kind)
    found = {fields[name].name: _shaped(value, hints[fields[name].name], f"{where}.{name}".lstrip(".")) for name, value in data.items()}
    try:
        return (Verbatim if verbatim else kind)(**given, **found)
    except SpecError as error:
        raise SpecError(f"{table}{error}") from error


def _shaped(value: Any, hint: Any, where: str) -> Any:
    """`value` as a field annotated with `hint` holds it, lists as tuples; a SpecError where it is something else."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is types.UnionType:  # `Group | None`: what is written is the first
        return _shaped(value, parts[0], where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if kind is Mapping and isinstance(value, dict):
        return {name: _shaped(each, parts[1], f"{where}.{name}") for name, each in value.items()}
    if kind is tuple and isinstance(value, list):
        return tuple(_shaped(each, parts[0], f"{where}[{at}]") for at, each in enumerate(value))
    if kind is Any or type(value) is kind or (kind, type(value)) == (float, int):
        return value
    raise SpecError(f"{f'[{where}]' if kind is Mapping else where} must be {SHAPES[kind]}, got {value!r}")
