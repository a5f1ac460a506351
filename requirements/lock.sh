#!/usr/bin/env bash
# Writes the hashed lock files beside it, for CPython 3.11 on Linux x86_64, from pyproject.toml and constraints.txt:
#
#   ci.txt     all that .ci/run installs: the package, demo and tests, linters, the documentation, and what builds it
#   demo.txt   all that the README's demo takes
#   torch.txt  PyTorch as PyPI has it, with the NVIDIA packages that it brings
#
# PyTorch is not in the first two: its builds (for a CPU, for this or that CUDA) are other files of one version, and a
# list of hashes would choose for you. --torch-backend takes a CPU build's requirements, which all builds have.
# Needs uv (pip install uv). UV_FIND_LINKS may name a folder that holds the CPU build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

common=(--python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-config --quiet)
export UV_CUSTOM_COMPILE_COMMAND="requirements/lock.sh"

# What builds the package is said in [build-system] alone.
build() { python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")'; }
backend=(--torch-backend cpu)
if [[ -n "${UV_FIND_LINKS:-}" ]]; then backend=(); fi
lock() { # FILE EXTRA...
  local extras=() each
  for each in "${@:2}"; do extras+=(--extra "$each"); done
  build | uv pip compile pyproject.toml - "${extras[@]}" "${common[@]}" "${backend[@]}" -c <(local_torch) \
    --no-emit-package torch --output-file "requirements/$1" >/dev/null
}
local_torch() { if [[ -n "${UV_FIND_LINKS:-}" ]]; then sed 's/^\(torch==.*\)$/\1+cpu/' constraints.txt; else cat constraints.txt; fi; }

lock ci.txt demo test dev docs
lock demo.txt demo
grep '^torch==' constraints.txt | UV_FIND_LINKS= uv pip compile - "${common[@]}" --output-file requirements/torch.txt >/dev/null
