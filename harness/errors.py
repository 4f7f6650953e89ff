"""What can go wrong, and whose turn it is.

ResurgenceError
├── SpecError          the request is wrong: an option, a task file, a name. Yours to fix.
├── PreconditionError  the measurement would mean nothing: its verdict is *invalid*.
└── StoreError         an artefact is missing, damaged or does not fit.

Every message says what was asked for, what was found, what is allowed and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ResurgenceError(Exception):
    """Root of every error this project raises on purpose."""


class SpecError(ResurgenceError, ValueError):
    """A request that cannot be carried out as written."""


class PreconditionError(ResurgenceError):
    """The measurement's own conditions failed, so its result would mean nothing."""


class StoreError(ResurgenceError):
    """An artefact in the store, or one that somebody brings, is not fit for use."""


def unknown(what: str, name: str, allowed: Iterable[str]) -> SpecError:
    """A SpecError that lists what exists and guesses what was meant."""
    names = sorted(allowed)
    guess = get_close_matches(name, names, n=1)
    hint = f" Did you mean '{guess[0]}'?" if guess else ""
    return SpecError(f"unknown {what} '{name}'; allowed: {', '.join(names) or 'none'}.{hint}")
