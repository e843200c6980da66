"""`expertflow demo`: the main job on the model that ships with expertflow."""

import argparse
from typing import Any

from ..demo import run_demo


def add_parser(commands: Any) -> None:
    """Add the command to `commands`, argparse's subparsers."""
    demo = commands.add_parser("demo", help="run the model that ships with expertflow")
    demo.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    run_demo()
    return 0
