"""Builds the binary parts with CMake; everything else is in pyproject.toml and CMakeLists.txt."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Configures, builds, and installs the libraries beside the Python files of the package."""

    def run(self) -> None:
        """Leaves the libraries in the source tree for an editable install, else in build_lib."""
        root = Path(__file__).parent.resolve()
        editable = bool(self.inplace)
        package = root / "expertflow" if editable else Path(self.build_lib).resolve() / "expertflow"
        build = root / "build" / "dev" if editable else Path(self.build_temp).resolve()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        # A cache of an earlier build points into an isolated environment that is gone: --fresh.
        configure = ["cmake", "--fresh", "-S", root, "-B", build, *generator]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")), check=True)
        subprocess.run(["cmake", "--build", build, "--parallel"], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", package], check=True)


# The extension has no sources of its own: it makes the wheel one of this platform and Python.
setup(ext_modules=[Extension("expertflow._core", [])], cmdclass={"build_ext": CMakeBuild})
