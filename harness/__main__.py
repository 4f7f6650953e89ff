"""What the harness does outside of pytest.

python -m harness store ls|verify|gc --store DIR    what a store holds, whether it is sound, what can go
python -m harness run FILE ... --store DIR          do single stages, from files that pytest --plan --jobs wrote
python -m harness ray FOLDER --store URL            do all of them on a Ray cluster
python -m harness bench                             what all this costs here
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from harness import cluster, inventory, jobfiles
from harness.bench import command as bench
from harness.errors import ResurgenceError

COMMANDS = {
    "store": (inventory, "what a store holds, whether it is sound, what can go"),
    "run": (jobfiles, "do single stages, from files that pytest --plan --jobs wrote"),
    "ray": (cluster, "do all of them on a Ray cluster"),
    "bench": (bench, "what all this costs here: seconds, UNet passes, images, bytes"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 2 where the request or the store is at fault."""
    parser = argparse.ArgumentParser(prog="python -m harness", description="What the harness does outside of pytest.")
    commands = parser.add_subparsers(required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add(command)
        command.set_defaults(run=module.main)
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except ResurgenceError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
