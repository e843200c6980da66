"""Finds the torch to build against, without importing it, and says which one to require.

Run as a script it prints "directory;version" for CMake, or exits 1 with the reason why not.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

MINIMUM_VERSION = (2, 10)
MINIMUM_REQUIREMENT = "torch>=2.10"

# In pip's build environment the target environment's packages are hidden by PYTHONPATH and a
# sitecustomize; the same interpreter with -E sees them again, .pth files included.
_FIND_IN_TARGET = """
import importlib.util
spec = importlib.util.find_spec("torch")
print(spec.origin if spec else "")
"""


class TorchTooOldError(Exception):
    """The torch that is there lacks the stable ABI that ExpertFlow's ops need."""


def find_torch() -> tuple[Path, str] | None:
    """Returns the package directory and the version of the torch to build against, or None.

    That is the one of the environment that the build is for, else the one of the build's own.

    Raises:
        TorchTooOldError: it is older than MINIMUM_VERSION.
    """
    directory = _target_torch()
    if directory is None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        directory = Path(spec.origin).parent
    version = _read_version(directory)
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < MINIMUM_VERSION:
        raise TorchTooOldError(
            f"torch {version} in {directory} is too old: ExpertFlow needs {MINIMUM_REQUIREMENT}"
        )
    return directory, version


def requirement() -> str:
    """Returns what to require: TORCH_SPEC, unless the target environment has a torch already.

    Requiring no more than the oldest torch there too keeps pip from replacing what is installed.
    """
    if _target_torch():
        return MINIMUM_REQUIREMENT
    # TORCH_SPEC may carry options for pip, "torch --index-url ...", which are no requirement.
    return os.environ.get("TORCH_SPEC", MINIMUM_REQUIREMENT).split(" --")[0]


def _target_torch() -> Path | None:
    command = [sys.executable, "-E", "-c", _FIND_IN_TARGET]
    origin = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return Path(origin).parent if origin else None


def _read_version(directory: Path) -> str:
    text = (directory / "version.py").read_text(encoding="utf-8")
    match = re.search(r"^__version__ = ['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else "0"


if __name__ == "__main__":
    try:
        found = find_torch()
    except TorchTooOldError as error:
        sys.exit(str(error))
    if found is None:
        sys.exit(f"no torch for {sys.executable}; install {MINIMUM_REQUIREMENT} first")
    print(*found, sep=";")
