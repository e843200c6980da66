"""What the build promises: a complete sdist, layers that stay apart, commands that exist."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

import pytest

import expertflow

ROOT = Path(__file__).parents[2]
CHECK_INCLUDES = ROOT / "tools" / "check_includes.py"


@pytest.fixture(scope="module")
def sdist_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files in an sdist of this tree, without its top folder."""
    directory = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, ROOT / "tests" / "packaging" / "build_sdist.py", directory]
    subprocess.run(command, check=True, capture_output=True)
    (archive,) = directory.glob("expertflow-*.tar.gz")
    with tarfile.open(archive) as sdist:
        members = [member.name for member in sdist.getmembers() if member.isfile()]
    return {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in members}


def _files(folder: str) -> set[str]:
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {
        str(path.relative_to(ROOT))
        for path in found
        if path.suffix not in {".so", ".pyc"} and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("folder", ["csrc", "cmake", "expertflow", "tools", "tests", ".ci"])
def test_sdist_has_every_file(folder: str, sdist_names: set[str]) -> None:
    expected = _files(folder)
    assert expected
    assert expected <= sdist_names


def test_sdist_has_the_build_files_and_no_binaries(sdist_names: set[str]) -> None:
    assert sdist_names >= {"setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "LICENSE"}
    assert not [name for name in sdist_names if name.endswith((".so", ".o", ".pyc"))]


def _check_includes(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, CHECK_INCLUDES, root]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_includes_of_this_tree_point_one_way() -> None:
    result = _check_includes(ROOT / "csrc")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("layer", "include"),
    [
        ("core", '"host/ram_pool.h"'),
        ("core", '"../host/ram_pool.h"'),
        ("core", '"planner.h"'),
        ("core", "<cuda_runtime.h>"),
        ("core", "<torch/csrc/stable/tensor.h>"),
        ("core", "<unistd.h>"),
        ("host", '"cuda/stream.h"'),
        ("host", '"ops/ops.h"'),
        ("host", "<cuda_runtime.h>"),
        ("host", "<pybind11/pybind11.h>"),
        ("ops", '"python/module.h"'),
        ("ops", "<c10/cuda/CUDAStream.h>"),
        ("python", '"ops/ops.h"'),
        ("python", "<torch/csrc/stable/tensor.h>"),
        ("elsewhere", "<vector>"),
    ],
)
def test_include_that_points_the_wrong_way_is_found(
    layer: str, include: str, tmp_path: Path
) -> None:
    (tmp_path / layer).mkdir()
    (tmp_path / layer / "file.cc").write_text(f"#include <vector>\n#  include {include}\n")
    result = _check_includes(tmp_path)
    assert result.returncode == 1
    assert f"{layer}/file.cc" in result.stdout


def test_commands_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_build_info_describes_the_binary() -> None:
    info = expertflow.build_info()
    assert set(info) == {
        "version",
        "compiler",
        "build_type",
        "torch_built_against",
        "torch_running",
        "cuda_compiler",
        "cuda_architectures",
        "cuda_missing_reason",
        "gpus",
        "gpus_missing_reason",
    }
    assert (info["cuda_compiler"] is None) == bool(info["cuda_missing_reason"])
    assert bool(info["cuda_architectures"]) == (info["cuda_compiler"] is not None)
    assert bool(info["gpus"]) == (info["gpus_missing_reason"] is None)
