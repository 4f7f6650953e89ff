"""A claim as JUnit properties: the numbers beside the test, for tools that read nothing else."""

from __future__ import annotations

import re

from harness.spec import Claim

PLAIN = ("verdict", "word", "claim", "suite", "task", "method", "finetune", "attack", "concept", "model", "lineage")
NUMBERS = ("steps", "tolerance", "direction", "n_errors", "detector")
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 forbids


def properties(claim: Claim) -> list[tuple[str, str]]:
    """Names and values of a claim. What was not measured is left out, so that no reader takes it for zero."""
    pairs = [(name, getattr(claim, name)) for name in PLAIN + NUMBERS]
    pairs += [(name, value) for name, value in (claim.rate or {}).items()]
    pairs += [(f"before.{name}", value) for name, value in (claim.before or {}).items()]
    pairs += [(f"base.{name}", value) for name, value in (claim.base or {}).items()]
    pairs += [(f"seed.{name}", value) for name, value in claim.seeds.items()]
    return [(_legal(name), _legal(str(value))) for name, value in pairs if value is not None]


def _legal(text: str) -> str:
    """`text` without characters that would make the XML unreadable; each becomes a visible replacement mark."""
    return ILLEGAL.sub("\ufffd", text)
