"""Builds the binary parts with CMake; the rest is in pyproject.toml and CMakeLists.txt."""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures, builds, and installs the libraries beside the Python files of the package."""

    def run(self) -> None:
        """Leaves the libraries in the source tree for an editable install, else in build_lib."""
        editable = bool(self.inplace)
        package = ROOT / "expertflow" if editable else Path(self.build_lib).resolve() / "expertflow"
        build = ROOT / "build" / "dev" if editable else Path(self.build_temp).resolve()
        # The tools of this environment count, whether or not it was activated.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        # --fresh: the cache of an earlier build may name an isolated environment that is gone.
        configure = ["cmake", "--fresh", "-S", ROOT, "-B", build]
        configure += ["-G", "Ninja"] if shutil.which("ninja") else []
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")), check=True)
        subprocess.run(["cmake", "--build", build, "--parallel", str(os.cpu_count())], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", package], check=True)


torch_requirement = runpy.run_path(str(ROOT / "cmake" / "find_torch.py"))["requirement"]()
setup(
    # The extension has no sources of its own: it makes the wheel one of this platform and Python.
    ext_modules=[Extension("expertflow._core", [])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[torch_requirement, "transformers>=5.7", "numpy", "safetensors", "tqdm"],
)
