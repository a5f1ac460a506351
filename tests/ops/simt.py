"""Runs the CUDA kernels on CPU tensors: builds ``d2net._simt`` (tests/simt) and lets the operators call it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock

from d2net.ops import _library, _native

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path) -> ModuleType:
    """The module that ``D2NET_SIMT_MODULE`` names, else one built (again where sources changed) in ``folder``.

    Skips the test where it cannot be built for want of tools.
    """
    if "D2NET_SIMT_MODULE" in os.environ:
        return _load(Path(os.environ["D2NET_SIMT_MODULE"]))
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("c++") is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("the CUDA kernels on the CPU need a C++ compiler: pip install cmake ninja pybind11")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DD2NET_SIMT=ON", f"-DD2NET_OUTPUT_DIR={folder / 'out'}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", *(["-G", "Ninja"] if shutil.which("ninja") else [])]
    with FileLock(folder / "lock"):  # gpu_check.sh beside pytest, say
        for command in (configure, [cmake, "--build", str(folder), "--parallel", "2"]):
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                pytest.fail(f"{' '.join(command)}\n{result.stdout[-4000:]}{result.stderr[-4000:]}", pytrace=False)
    return _load(next((folder / "out").glob("_simt*")))


@contextlib.contextmanager
def kernels_on_the_cpu(module: ModuleType) -> Iterator[None]:
    """Within the block, operators on CPU tensors run their CUDA kernels."""

    def cuda(function: str, dtype: torch.dtype, device: torch.device, *args: object) -> object:
        assert device.type == "cpu", device
        name = f"cuda_{function}_{_native._SUFFIX[dtype]}"
        return getattr(module, name)(*args, -1, 0)  # no device, null stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "cuda", cuda)
        overrides = torch.library.Library("d2net", "IMPL")  # destroying it restores the CPU kernels
        try:
            for name, function in _library.CUDA_FUNCTIONS.items():
                patch.setitem(_library.KERNELS[name], "cpu", function)
                # torch before 2.8 refuses a second implementation from Python unless it is made to forget the first.
                torch.library._impls.discard(f"d2net/{name}/CPU")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    overrides.impl(name, function, "CPU")
            yield
        finally:
            overrides._destroy()


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("d2net._simt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
