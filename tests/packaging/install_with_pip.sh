#!/usr/bin/env bash
# Installs with pip in fresh environments: from an sdist with build isolation, and from a checkout without. Both see the torch
# of .venv through a .pth file, since copying gigabytes proves nothing more, and must build against it.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Only what the sdist holds, so that the checkout's build folder and libraries play no part.
.venv/bin/python tests/packaging/build_sdist.py "$work"
tar xzf "$work"/expertflow-*.tar.gz -C "$work" --one-top-level=checkout --strip-components=1

fresh_environment() {
  .venv/bin/python -m venv "$1"
  local site
  site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # .venv's packages but for ExpertFlow itself, which the installation must bring.
  mkdir "$1/borrowed"
  find "$root"/.venv/lib/python*/site-packages -mindepth 1 -maxdepth 1 -not -iname '*expertflow*' \
    -exec ln -s {} "$1/borrowed/" \;
  echo "$1/borrowed" >"$site/borrowed.pth"
}

check_import() {
  (cd / && "$1/bin/python" -c '
import sys, expertflow, torch
info = expertflow.build_info()
print(info)
assert expertflow.__file__.startswith(sys.prefix), expertflow.__file__
assert info["torch_built_against"] == torch.__version__, info
' && "$1/bin/expertflow" --help >/dev/null)
}

echo "== pip install of the sdist, isolated"
fresh_environment "$work/isolated"
"$work/isolated/bin/python" -m pip install --quiet "$work"/expertflow-*.tar.gz
check_import "$work/isolated"

echo "== pip install --no-build-isolation of a checkout"
fresh_environment "$work/direct"
"$work/direct/bin/python" -m pip install --quiet "setuptools>=77" cmake ninja pybind11
"$work/direct/bin/python" -m pip install --quiet --no-build-isolation "$work/checkout"
check_import "$work/direct"
