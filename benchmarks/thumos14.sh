#!/usr/bin/env bash
# The paper's Tables 1, 3 and 4 on real THUMOS14, in one call that can be repeated: docs/thumos14.md.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python3}" "$here/thumos14.py" "$@"
