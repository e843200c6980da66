"""Options and types of values that several commands share."""

import argparse
import math

from .._core import MAX_HORIZON, POLICIES


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory, or Hub id, which is downloaded unless the Hub cache has it",
    )


def add_ram_limit(parser: argparse.ArgumentParser) -> None:
    """Add --ram-limit."""
    parser.add_argument("--ram-limit", metavar="SIZE", help="memory to assume to be available")


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add what `from_pretrained` takes."""
    parser.add_argument(
        "--expert-cache", default="25%", metavar="SIZE", help='"25%%", "8GiB", ... (default 25%%)'
    )
    parser.add_argument("--policy", choices=POLICIES, default="decayed_frequency")
    parser.add_argument("--cache-scope", choices=("global", "layer"), default="global")
    parser.add_argument("--pool", choices=("ram", "file"), default="ram")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--prefetch",
        type=prefetch,
        default=False,
        metavar="auto|N|off",
        help=f"auto, or 1 to {MAX_HORIZON} layers ahead (default off)",
    )
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 (default: auto)"
    )
    add_ram_limit(parser)


def prefetch(text: str) -> str | int:
    """Parse what `from_pretrained` takes as `prefetch`; "off" is False."""
    if text in ("auto", "off"):
        return "auto" if text == "auto" else False
    if not text.isdecimal() or not 1 <= int(text) <= MAX_HORIZON:
        raise argparse.ArgumentTypeError(f"{text} is not auto, off or 1 to {MAX_HORIZON}")
    return int(text)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def not_negative(text: str) -> float:
    """Parse a number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def share(text: str) -> float:
    """Parse a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to 1")
    return value
