"""setuptools' build backend, which asks for torch only where the target environment has none.

Torch as a plain build requirement would make every isolated build download gigabytes, although its
headers lie on disk already. An sdist needs no torch at all.
"""

from collections.abc import Mapping

import find_torch
import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

# Without build isolation nobody has checked it, and an older one misreads pyproject.toml.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise ImportError(
        f"setuptools {setuptools.__version__} is too old to build ExpertFlow: "
        'pip install "setuptools>=77" cmake ninja pybind11'
    )


def get_requires_for_build_wheel(config_settings: Mapping | None = None) -> list[str]:
    """Setuptools' requirements, and torch (or TORCH_SPEC) where there is none to build against."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirements()


def get_requires_for_build_editable(config_settings: Mapping | None = None) -> list[str]:
    """As for a wheel."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirements()


def _torch_requirements() -> list[str]:
    return [] if find_torch.find_torch() else [find_torch.requirement()]
