"""Checks that the includes of csrc/ point one way: each layer may use only the layers below it.

CMake gives each layer of libexpertflow an include root without the others; this check also covers
the folders above it, relative includes, and third-party headers. Prints what violates, exits 1.
"""

import argparse
import re
import sys
from pathlib import Path

LAYERS = {
    "core": set(),
    "host": {"core"},
    "cuda": {"core", "host"},
    "ops": {"core", "host", "cuda"},
    "python": {"core", "host", "cuda"},
}
# What a layer may use besides the C++ standard library: folders of headers, and headers.
LIBRARIES = {
    "host": {"sys"},
    "cuda": {"sys"},
    "ops": {"torch"},
    "python": {"pybind11"},
}
PLAIN_HEADERS = {
    "host": {"fcntl.h", "pthread.h", "unistd.h"},
    "cuda": {
        "cuda_runtime_api.h",
        "cuda_runtime.h",
        "cuda_bf16.h",
        "cuda_fp16.h",
        "cuda_pipeline_primitives.h",
    },
    "ops": {"dlfcn.h", "cuda_runtime_api.h"},
}
STANDARD_HEADER = re.compile(r"[a-z_]+")  # <vector>; not <unistd.h>, not <cuda_runtime.h>
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def check_file(path: Path, layer: str) -> list[str]:
    """Returns one message for each include of the file that its layer may not have."""
    errors = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = INCLUDE.match(line)
        if match and (reason := _violation(layer, match[1] == '"', match[2])):
            errors.append(f"{path}:{number}: {line.strip()}: {reason}")
    return errors


def _violation(layer: str, quoted: bool, header: str) -> str | None:
    folder = header.split("/")[0] if "/" in header else None
    if quoted:
        if folder in LAYERS and ".." not in header.split("/"):
            allowed = folder == layer or folder in LAYERS[layer]
            return None if allowed else f"{layer} may not use {folder}"
        if header == "expertflow_build_info.h" and layer == "python":
            return None
        return 'our headers are named from csrc/, as "core/ids.h"'
    if folder is not None:
        allowed = folder in LIBRARIES.get(layer, set())
        return None if allowed else f"{layer} may not use the library {folder}"
    if STANDARD_HEADER.fullmatch(header) or header in PLAIN_HEADERS.get(layer, set()):
        return None
    return f"{layer} may not use <{header}>"


def main() -> int:
    """Checks a source tree; the repository's csrc/ unless another is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent.parent / "csrc"
    parser.add_argument("root", type=Path, nargs="?", default=default)
    root = parser.parse_args().root
    errors = []
    for path in sorted(root.rglob("*")):
        if path.suffix not in {".h", ".cc", ".cu", ".cuh"}:
            continue
        layer = path.relative_to(root).parts[0]
        if layer in LAYERS:
            errors += check_file(path, layer)
        else:
            errors.append(f"{path}: {layer} is not a layer; add it to {Path(__file__).name}")
    print(*errors, sep="\n", end="\n" if errors else "")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
