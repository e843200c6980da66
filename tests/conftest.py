"""Settings and shared models for all Python tests."""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import expertflow

# Graphs that an earlier version of the ops was compiled into are no test of this one.
_inductor_cache = tempfile.TemporaryDirectory()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor_cache.name

# The models are tiny: more threads would only wait for each other on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The fp32 checkpoint of a family, in two or more shards; not to be changed."""

    @cache
    def make(family: str) -> Path:
        path = tmp_path_factory.mktemp(family)
        return tiny_models.make_checkpoint(family, path, max_shard_size="100KB")

    return make


@pytest.fixture(scope="session")
def tiny_streamed(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    """The streamed model of a family, dtype and pool; a test gives it a cache of its own first."""

    @cache
    def load(family: str, dtype: torch.dtype = torch.float32, pool: str = "ram") -> Any:
        return expertflow.from_pretrained(
            tiny_checkpoint(family), expert_cache="100%", dtype=dtype, pool=pool, progress=False
        )

    return load


@pytest.fixture(scope="session")
def qwen_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE checkpoint in one file; not to be changed."""
    return tiny_models.make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="session")
def sharded_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several shards."""
    path = tmp_path_factory.mktemp("sharded")
    return tiny_models.make_checkpoint("qwen3_moe", path, max_shard_size="60KB")


@pytest.fixture
def own_path(qwen_path: Path, tmp_path: Path) -> Path:
    """A copy of `qwen_path` that a test may damage."""
    return Path(shutil.copytree(qwen_path, tmp_path / "model"))
