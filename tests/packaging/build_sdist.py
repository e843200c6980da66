"""Builds an sdist into the named directory, through the build backend's own hook."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Prints the sdist's path."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "cmake"))
    import build_backend  # importable only from cmake/, as pyproject.toml's backend-path says

    directory = Path(sys.argv[1])
    print(directory / build_backend.build_sdist(str(directory)))


if __name__ == "__main__":
    main()
