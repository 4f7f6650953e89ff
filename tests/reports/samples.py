"""Claims as a run would deliver them, and names that want to break a report."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from harness.spec import Claim
from reports.words import UNASKED

NASTY = (
    'O\'Brien "Bob" <script>alert(1)</script> & {{ 7 * 7 }} {% if %}',
    "</title></style></script><img src=x onerror=alert(1)>",
    "' onfocus='alert(1)' x='",
    "\N{GRINNING FACE} עברית \u202eevil\u202c ]]> -->",
    "\x00\x07\x1b[31mred\x1b[0m\r\n\tnext line\ufffe",
    "n" * 300,
)
NAMES = st.one_of(st.sampled_from(NASTY), st.text(max_size=300))


def rate(k: int, n: int = 40, low: float | None = None, high: float | None = None) -> dict[str, float]:
    """A rate with bounds a tenth to either side."""
    value = k / n
    return {"k": k, "n": n, "value": value, "low": low if low is not None else max(0, value - 0.1), "high": high if high is not None else min(1, value + 0.1)}


def claim(concept: str = "Ada", **change: Any) -> Claim:
    """A claim that holds: nothing came back after 200 steps."""
    values: dict[str, Any] = {
        "suite": "celebrity", "task": "pocket-10", "claim": "stays-forgotten", "sentence": f"{concept} stays forgotten", "direction": "below",
        "model": "pocket", "method": "esd", "finetune": "in-domain", "attack": None, "steps": 200, "concept": concept,
        "seeds": {"unlearn": 0, "finetune": 0}, "detector": "classifier", "rate": rate(0), "before": rate(0), "base": rate(40), "n_errors": 0,
        "tolerance": 0.1, "verdict": "holds", "word": "holds", "reason": "", "lineage": "ab" * 16,
    }  # fmt: skip
    values |= change
    values.setdefault("id", "-".join(str(values[key]) for key in ("claim", "method", "finetune", "steps", "concept")))
    return Claim(**values)


def forgotten(concept: str = "Ada", **change: Any) -> Claim:
    """A claim right after unlearning."""
    return claim(concept, **({"claim": "forgotten", "finetune": None, "steps": 0, "before": None} | change))


def resurged(concept: str = "Ada", **change: Any) -> Claim:
    """A claim that is broken because the concept came back."""
    return claim(concept, **({"rate": rate(24), "verdict": "broken", "word": "resurged", "reason": "lower bound above .10"} | change))


def unasked(concept: str = "Ada", **change: Any) -> Claim:
    """A claim about the concept on prompts that do not name it."""
    return claim(UNASKED.format(concept), **({"claim": "stays-out", "before": None, "base": rate(0)} | change))


def retained(steps: int = 200, **change: Any) -> Claim:
    """A claim about those who must survive."""
    kept = {"claim": "retained", "direction": "above", "tolerance": 0.8, "rate": rate(190, 200), "before": None, "base": None, "steps": steps}
    return claim("10 retained people", **(kept | change))


def png(path: Path, shade: int = 0) -> str:
    """A one-pixel grey PNG; returns its path."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = bytes([0, 0, 0, 1, 0, 0, 0, 1, 8, 0, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes([0, shade]))) + chunk(b"IEND", b""))
    return str(path)
