"""What this installation of ExpertFlow was built with, and what it runs on."""

from typing import TypedDict, cast

import torch

from expertflow import _core


class Gpu(TypedDict):
    """One GPU of this machine."""

    name: str
    compute_capability: tuple[int, int]
    total_memory_bytes: int
    numa_node: int | None  # of the host, nearest to it; None if not known


class BuildInfo(TypedDict):
    """The result of `build_info()`."""

    version: str
    compiler: str
    build_type: str
    torch_built_against: str
    torch_running: str
    # The CUDA backend: the compiler and architectures ("90-real", "90-virtual" for PTX) it was
    # built with; or None, [] and the reason why it was left out.
    cuda_compiler: str | None
    cuda_architectures: list[str]
    cuda_missing_reason: str | None
    # The GPUs of this machine, or [] and the reason why none can be used.
    gpus: list[Gpu]
    gpus_missing_reason: str | None


def build_info() -> BuildInfo:
    """Returns how the binary parts were built, the torch that runs them, and the GPUs present.

    Needs neither a GPU nor a driver, and allocates nothing on a GPU.
    """
    return cast(BuildInfo, _core.build_info() | {"torch_running": str(torch.__version__)})
