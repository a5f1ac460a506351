#!/usr/bin/env bash
# Installs a wheel as a user does, into a fresh environment without a compiler or CUDA toolkit on PATH, beside each
# of several versions of PyTorch, and runs it: the tests of operators and losses, and the demo.
#
#   packaging/check_wheel.sh WHEEL [TORCH...]              # TORCH: 2.7.1 2.11.0 2.13.0
#
# The interpreter is the one of the wheel's tag, python3.11 for cp311, or PYTHON. What PyTorch comes from is up to pip:
# PIP_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_EXTRA_INDEX_URL=https://pypi.org/simple takes builds for CPUs, a
# plain call PyPI's, which are for CUDA (and import without a GPU).
set -euo pipefail

wheel="$(realpath "$1")"
shift
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
tag="$(basename "$wheel" | sed -E 's/.*-cp3([0-9]+)-cp3.*/3.\1/')"
python="${PYTHON:-python$tag}"
[[ $# -gt 0 ]] || set -- 2.7.1 2.11.0 2.13.0

for torch in "$@"; do
  printf '\n== %s, torch %s\n' "$("$python" --version)" "$torch"
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
  "$python" -m venv "$work/venv"
  "$work/venv/bin/pip" install -q "torch==$torch" "${wheel}[demo]" pytest hypothesis
  bare=(env -i "HOME=$work" "PATH=$work/venv/bin" OMP_NUM_THREADS=2)
  cp -r "$root"/{tests,docs,pyproject.toml} "$work" # without the source beside them
  cd "$work"
  "${bare[@]}" python -c "import d2net, torch; from d2net.ops import build_info; print(d2net.__file__, torch.__version__, build_info())"
  "${bare[@]}" pytest -q tests/test_every_operator.py tests/losses
  time "${bare[@]}" d2net demo
  cd "$root"
  rm -rf "$work"
done
