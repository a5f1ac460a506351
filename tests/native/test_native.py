"""The C++ of the CPU operators under sanitizers: built without Python and run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_operators_under_a_sanitizer(sanitizer, tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler: pip install cmake ninja")
    for command in (
        [cmake, "-S", str(HERE), "-B", str(tmp_path), f"-DSANITIZE={sanitizer}"],
        [cmake, "--build", str(tmp_path), "--parallel", "2"],
        [str(tmp_path / "native_tests")],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-8000:]
