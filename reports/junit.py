"""A claim in JUnit: the numbers beside the test, for tools that read nothing else.

Properties are for those who parse them; Jenkins and GitLab show a person only the message and `system-out`, so the same
numbers stand there again.
"""

from __future__ import annotations

import re

from harness.spec import Claim
from reports import words

PLAIN = ("verdict", "word", "claim", "suite", "task", "method", "finetune", "attack", "concept", "model", "lineage")
NUMBERS = ("steps", "tolerance", "direction", "n_errors", "detector")
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 forbids


def properties(claim: Claim) -> list[tuple[str, str]]:
    """Names and values of a claim. What was not measured is left out, so that no reader takes it for zero."""
    pairs = [(name, getattr(claim, name)) for name in PLAIN + NUMBERS]
    rates = (("", claim.rate), ("before.", claim.before), ("base.", claim.base))
    for prefix, numbers in (*rates, ("log_e.", claim.evidence), ("seed.", claim.seeds), ("diagnosis.", claim.diagnosis)):
        pairs += [(prefix + name, value) for name, value in (numbers or {}).items()]
    return [(legal(name), legal(str(value))) for name, value in pairs if value is not None]


def text(claim: Claim) -> str:
    """The same numbers for `system-out`, one to a line, led by the sentence."""
    lines = [str(claim), *(f"{name}: {value}" for name, value in properties(claim))]
    lines += [f"prompt {prompt!r}: {hits.count('1')}/{len(hits)}" for prompt, hits in claim.hits.items()]
    return "\n".join(words.clean(line) for line in lines)


def legal(raw: str) -> str:
    """`raw` without characters that would make the XML unreadable; each becomes a visible replacement mark."""
    return ILLEGAL.sub("\ufffd", raw)
