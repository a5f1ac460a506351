"""What nvcc makes of the kernels, for each chip: registers and local memory."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from d2net.ops import build_info

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

pytestmark = pytest.mark.slow

ARCHS = ["75", "80", "90", "100", "120"]


@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_compiles_the_block_kernels_without_warnings_spills_or_local_memory(arch, tmp_path):
    """Parts of kernels in sizes that no kernel of the extension has."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    if f"compute_{arch}\n" not in subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout:
        pytest.skip(f"this nvcc knows no sm_{arch}")
    flags = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", f"-I{CSRC}"]
    target = ["-cubin", f"-arch=sm_{arch}", str(HERE / "block_kernels.cu"), "-o", str(tmp_path / "block.cubin")]
    result = subprocess.run([nvcc, *flags, *target], capture_output=True, text=True)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-8000:]
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert used and set(used) == {("0", "0", "0")}, report[-4000:]


# Kernels that may use local memory, by chip: bytes, and why.
SPILLED = "spilled registers; whether fewer threads at once would be faster was never timed, for want of such a chip"
LOCAL_MEMORY_ALLOWED = {
    ("sm_100", "pool_gradient_kernel"): (16, SPILLED),
    ("sm_100", "two_by_two_kernel"): (16, SPILLED),
}


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, tuple[int, int]]]:
    """By chip and kernel of the installed extension: bytes of stack, where spilled registers are, and local memory."""
    if not build_info()["cuda"]:
        pytest.skip("needs an extension with CUDA kernels")
    package = importlib.util.find_spec("nvidia")  # of nvidia-cuda-cuobjdump
    folders = [f"{x}/cu13/bin" for x in package.submodule_search_locations or ()] if package else []
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))
    module = importlib.util.find_spec("d2net._C")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump")
    printed = subprocess.run(
        [cuobjdump, "-res-usage", module.origin], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for line in printed.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            kernels = found.setdefault(match[1], {})
        elif match := re.match(r" Function (\w+):", line):
            kernel = match[1]
        elif match := re.search(r"STACK:(\d+) .*LOCAL:(\d+)", line):
            kernels[kernel] = int(match[1]), int(match[2])
    return found


def test_no_kernel_of_the_extension_spills_or_uses_local_memory(resources):
    archs = {
        f"sm_{re.match('[0-9]+', arch)[0]}" for arch in build_info()["cuda_archs"].split() if "virtual" not in arch
    }
    assert archs == set(resources)
    for arch, kernels in resources.items():
        ours = [name for name in kernels if "cub" not in name.split("d2net")[0]]  # CUB tunes its own
        assert len(ours) > 100
        for name in ours:
            (stack, local), allowed = kernels[name], [0]
            allowed += [n for (chip, part), (n, _) in LOCAL_MEMORY_ALLOWED.items() if chip == arch and part in name]
            assert stack <= max(allowed) and local == 0, f"{arch} {name}: {stack} of stack, {local} local"
