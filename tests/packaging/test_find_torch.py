"""Which torch the build finds, and which one it requires."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "cmake" / "find_torch.py"


@pytest.fixture
def find_torch() -> ModuleType:
    """A copy of the module that a test may change."""
    spec = importlib.util.spec_from_file_location("find_torch", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fake_torch(directory: Path, version: str) -> Path:
    package = directory / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")
    return package


def test_finds_the_torch_of_this_environment(find_torch: ModuleType) -> None:
    assert find_torch.find_torch() == (Path(torch.__file__).parent, str(torch.__version__))


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0+git1234"])
def test_recent_versions_will_do(
    version: str, find_torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = _fake_torch(tmp_path, version)
    monkeypatch.setattr(find_torch, "_target_torch", lambda: package)
    assert find_torch.find_torch() == (package, version)


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.1"])
def test_old_version_is_refused_by_name(
    version: str, find_torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = _fake_torch(tmp_path, version)
    monkeypatch.setattr(find_torch, "_target_torch", lambda: package)
    with pytest.raises(find_torch.TorchTooOldError) as raised:
        find_torch.find_torch()
    assert version in str(raised.value)
    assert "torch>=2.10" in str(raised.value)


def test_falls_back_to_the_torch_of_the_build(
    find_torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = _fake_torch(tmp_path, "2.11.0")
    monkeypatch.setattr(find_torch, "_target_torch", lambda: None)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_torch.find_torch() == (package, "2.11.0")


@pytest.mark.parametrize(
    ("installed", "torch_spec", "required"),
    [
        (True, "torch==2.13.0", "torch>=2.10"),
        (False, "torch==2.13.0", "torch==2.13.0"),
        (False, "torch --index-url https://example.org/cpu", "torch"),
        (False, None, "torch>=2.10"),
    ],
)
def test_torch_spec_counts_only_where_there_is_no_torch(
    installed: bool,
    torch_spec: str | None,
    required: str,
    find_torch: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(find_torch, "_target_torch", lambda: Path("torch") if installed else None)
    monkeypatch.delenv("TORCH_SPEC", raising=False)
    if torch_spec is not None:
        monkeypatch.setenv("TORCH_SPEC", torch_spec)
    assert find_torch.requirement() == required
