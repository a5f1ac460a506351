#!/usr/bin/env bash
# Compiles the C++ of the CPU for platforms that this machine is not, by Zig's clang and the headers that it brings:
# macOS and Linux on arm64, and Windows, there also with the extensions of MSVC and its late parsing of templates.
# Nothing is linked with Python or run, and MSVC's own compiler may still object.
#
#   packaging/other_platforms.sh          # needs zig: pip install ziglang
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

zig=(python3 -m ziglang)
object="$(mktemp)"
trap 'rm -f "$object"' EXIT
flags=(-std=c++17 -Wall -Wextra -Werror -O1 -Icsrc)
msvc=(-fms-extensions -fdelayed-template-parsing) # -fms-compatibility is not for these headers

for target in aarch64-macos aarch64-linux-gnu.2.28 x86_64-windows-gnu "x86_64-windows-gnu ${msvc[*]}"; do
  for file in csrc/cpu/*.cpp csrc/cpu/common/*.cpp; do
    # shellcheck disable=SC2086
    "${zig[@]}" c++ -target $target "${flags[@]}" -c "$file" -o "$object"
  done
  echo "compiles: $target"
done
