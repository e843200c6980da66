"""The commands of `expertflow`, a module for each; `add_parser` of a module adds its command."""

from . import demo, generate, info, record

ALL = (generate, demo, info, record)  # in the order of --help
