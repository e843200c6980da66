"""The command line: runs one of `commands`."""

import argparse
import sys
from collections.abc import Sequence

from . import commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 after an error, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        _say("\nexpertflow: interrupted")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has gone: nothing more to say
        return 141
    except (ValueError, OSError, MemoryError, NotImplementedError) as error:
        _say(f"expertflow: error: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expertflow",
        description="Runs mixture-of-experts models whose experts do not fit in memory.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in commands.ALL:
        command.add_parser(subparsers)
    return parser


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
