"""Finds the torch to build against, without importing it.

Run as a script it prints "directory;version" for CMake, or exits 1 with the reason why not.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

MINIMUM_VERSION = (2, 10)

# In pip's build environment the target environment's packages are hidden by PYTHONPATH and a
# sitecustomize; the same interpreter with -E sees them again, .pth files included.
_FIND_IN_TARGET = (
    "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
)


class TorchTooOldError(Exception):
    """The torch that is there lacks the stable ABI that ExpertFlow's ops need."""


def find_torch() -> tuple[Path, str] | None:
    """Returns the package directory and the version of this environment's torch, None without one.

    Looks where this process imports from first, then in the environment that the build is for.

    Raises:
        TorchTooOldError: it is older than MINIMUM_VERSION.
    """
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    if not origin:
        command = [sys.executable, "-E", "-c", _FIND_IN_TARGET]
        origin = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not origin:
        return None
    directory = Path(origin).parent
    version = _read_version(directory)
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < MINIMUM_VERSION:
        raise TorchTooOldError(
            f"torch {version} in {directory} is too old: ExpertFlow needs torch>=2.10"
        )
    return directory, version


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
        sys.exit(f"no torch for {sys.executable}; install torch>=2.10 first")
    print(*found, sep=";")
