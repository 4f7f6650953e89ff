"""`python -m harness.detection convert KIND FILE FOLDER [--labels FILE] [--none LABEL]`: published weights to safetensors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.detection._convert import RECIPES, convert
from harness.errors import ResurgenceError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all went well."""
    parser = argparse.ArgumentParser(prog="python -m harness.detection", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("convert", help="turn a published pickle into safetensors without running what is in it")
    command.add_argument("kind", choices=sorted(RECIPES))
    command.add_argument("file", type=Path, help="the file as published")
    command.add_argument("folder", type=Path, help="where the detector will find it")
    command.add_argument("--labels", type=Path, help="class names: one a line in the checkpoint's order, or GCD's labels.csv")
    command.add_argument("--none", help="the label that means that no concept is shown, if there is one")
    given = parser.parse_args(arguments)
    try:
        for path in convert(given.kind, given.file, given.folder, given.labels, given.none):
            print(path)
    except ResurgenceError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
