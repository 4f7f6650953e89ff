"""Task files (TOML), and the files of prompts that they name. No torch in here."""

from __future__ import annotations

import csv
import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from harness.errors import SpecError, unknown
from harness.spec import BLOCKS, Group, Quality, Sampler, Task, Tolerance, Verbatim, canonical

GROUPS = ("erased", "anchor", "retain", "retained")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tiff")


def read(path: Path) -> Task:
    """The task in a file; the file's name is its id. `like = "other"` starts from that file beside it and replaces whole keys."""
    try:
        data = _parsed(path)
        if "asked" in data:
            data["asked"] = str(path.parent / data["asked"])
        return made(path.stem, data)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, SpecError, TypeError) as error:
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
    allowed = {f.name for f in dataclasses.fields(Task)} - {"id"}
    for name in data:
        if name not in allowed:
            raise unknown("key", name, allowed)
    for name in GROUPS:
        data[name] = _build(Group, data.get(name, {}), name)
    if not (sets := data.get("finetune")) or not isinstance(sets, dict):
        raise SpecError("[finetune] needs at least one set of concepts, such as [finetune.in]")
    data["finetune"] = {name: _build(Group, group, f"finetune.{name}") for name, group in sets.items()}
    data["sampler"] = _build(Sampler, data.get("sampler", {}), "sampler")
    data["tolerance"] = _build(Tolerance, data.get("tolerance", {}), "tolerance")
    if "crossed" in data:
        data["crossed"] = _build(Group, data["crossed"], "crossed")
    if "quality" in data:
        data["quality"] = _build(Quality, data["quality"], "quality")
    data |= {name: _methods(data[name], name) for name in ("methods", "smoke") if name in data}
    data["synonyms"] = {name: tuple(also) for name, also in data.get("synonyms", {}).items()}
    return Task(id=id, **data)


def _methods(texts: Any, where: str) -> tuple[str, ...]:
    """Methods as on the command line; without any nothing would be measured, but `smoke` falls back on `methods`."""
    if not isinstance(texts, list) or not (texts or where == "smoke") or not all(isinstance(text, str) for text in texts):
        raise SpecError(f'{where} must be a list of at least one method, such as ["esd"], got {texts!r}')
    return tuple(texts)


def _build(kind: type[Any], data: dict[str, Any], where: str) -> Any:
    """`kind(**data)` with lists as tuples and unknown keys refused. Prompts given as `verbatim` do not hold the concept's name."""
    if not isinstance(data, dict):
        raise SpecError(f"[{where}] must be a table, got {type(data).__name__}")
    if kind is Group and "verbatim" in data and "prompts" not in data:
        kind, data = Verbatim, {("prompts" if name == "verbatim" else name): value for name, value in data.items()}
    allowed = {f.name: f for f in dataclasses.fields(kind)}
    for name in data:
        if name not in allowed:
            raise unknown(f"key in [{where}]", name, allowed)
    if lacking := [name for name, f in allowed.items() if f.default is dataclasses.MISSING and name not in data]:
        raise SpecError(f"[{where}] lacks {' and '.join(lacking)}")
    if issubclass(kind, Group) and (single := [name for name, value in data.items() if not isinstance(value, list)]):
        raise SpecError(f"{single[0]} in [{where}] must be a list, got {data[single[0]]!r}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
