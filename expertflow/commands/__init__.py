"""The commands of `expertflow`, a module for each; `add_parser` of a module adds its command."""

from . import demo, generate, info, record, simulate

ALL = (generate, demo, info, record, simulate)  # in the order of --help
