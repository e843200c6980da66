"""The commands of `expertflow`, a module for each; `add_parser` of a module adds its command."""

from . import demo, generate, info

ALL = (generate, demo, info)  # in the order of --help
