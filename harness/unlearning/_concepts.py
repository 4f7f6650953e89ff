"""What several methods ask of a request before they touch a weight. Files with a leading underscore are no methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from harness.errors import SpecError
from harness.pipeline import Pipe


def distinct(pipe: Pipe, erased: Sequence[str], others: Sequence[str] = (), field: str = "anchor") -> None:
    """Every erased concept must say something to the model, and something else than each of `others`, which `field` names."""
    try:
        null, *rest = pipe.encode(["", *erased, *others])
    except SpecError as error:
        raise SpecError(f"the task's `erased` or `{field}`: {error}") from error
    for concept, text in zip(erased, rest, strict=False):
        if torch.equal(text, null):
            raise SpecError(f"to this model the concept {concept!r} is an empty prompt; name another in the task's `erased`")
        for other, its in zip(others, rest[len(erased) :], strict=True):
            if torch.equal(text, its):
                raise SpecError(f"to this model the concept {concept!r} and the {field} {other!r} are the same; choose another `{field}`")


def positive(stage: Any, *fields: str) -> None:
    """These fields of a stage count something that must be there."""
    for field in fields:
        if (value := getattr(stage, field)) < 1:
            raise SpecError(f"`{field}` must be at least 1, got {value}")
