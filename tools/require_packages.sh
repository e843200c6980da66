#!/bin/sh
# Sees to it that the system packages of the named features are there:
# make, python, compiler, gtest, benchmark.
# What is missing is installed where that needs no question (root, or sudo without a password);
# otherwise the command that installs it is named, and the exit status is 1.
set -eu

PYTHON=${PYTHON:-python3}
missing=

need() { missing="$missing $*"; }

# Looks where CMake will look, too.
have_header() {
  for prefix in $(echo "${CMAKE_PREFIX_PATH:-}" | tr ':' ' '); do
    [ ! -e "$prefix/include/$1" ] || return 0
  done
  echo "#include <$1>" | ${CXX:-c++} -E -x c++ - >/dev/null 2>&1
}

find_missing() {
  missing=
  for feature in "$@"; do
    case $feature in
      make) command -v make >/dev/null || need make ;;
      python)
        # A virtual environment that works is proof enough: then ensurepip has done its part.
        if ! command -v "$PYTHON" >/dev/null; then
          need python3 python3-venv python3-dev
          continue
        fi
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
          echo "ExpertFlow needs Python >= 3.10, $PYTHON is older: make PYTHON=python3.12 ..." >&2
          exit 1
        }
        [ -x .venv/bin/pip ] || "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || need python3-venv
        "$PYTHON" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' || need python3-dev
        ;;
      compiler) command -v "${CXX:-c++}" >/dev/null || need g++ ;;
      gtest) have_header gmock/gmock.h || need libgtest-dev libgmock-dev ;;
      benchmark) have_header benchmark/benchmark.h || need libbenchmark-dev ;;
      *) echo "$0: unknown feature '$feature'" >&2; exit 2 ;;
    esac
  done
}

find_missing "$@"
[ -n "$missing" ] || exit 0

sudo=
[ "$(id -u)" = 0 ] || sudo="sudo -n"
if command -v apt-get >/dev/null && $sudo true 2>/dev/null; then
  echo "Installing system packages:$missing"
  export DEBIAN_FRONTEND=noninteractive
  # shellcheck disable=SC2086  # a list of words
  if $sudo apt-get update -qq && $sudo apt-get install -y -qq --no-install-recommends $missing; then
    find_missing "$@"
    [ -n "$missing" ] || exit 0
  fi
fi
echo "ExpertFlow needs these system packages:$missing" >&2
echo "On Debian or Ubuntu:  sudo apt-get install$missing" >&2
exit 1
