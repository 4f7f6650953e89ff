"""`python -m reports compare A B` says what changed between two runs; `python -m reports schema` prints the schema of verdict.json."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import ResurgenceError


def main(arguments: Sequence[str] | None = None) -> int:
    """0; from `compare` 1 if something got worse; 2 if it could not be done."""
    parser = argparse.ArgumentParser(prog="python -m reports", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    two = commands.add_parser("compare", help="what changed between two runs; exit code 1 if something got worse")
    for name in ("before", "after"):
        two.add_argument(name, type=Path, help="a report folder or its verdict.json")
    commands.add_parser("schema", help="the JSON Schema of verdict.json")
    given = parser.parse_args(arguments)
    try:
        return _compare(given.before, given.after) if given.command == "compare" else _schema()
    except ResurgenceError as error:
        print(error, file=sys.stderr)
        return 2


def _compare(before: Path, after: Path) -> int:
    from reports import compare

    found = compare.compare(compare.read(before), compare.read(after))
    print("\n".join(compare.lines(found)))
    return int(found.worse)


def _schema() -> int:
    from reports.schema import schema

    print(json.dumps(schema(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
