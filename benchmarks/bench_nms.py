"""NMS of segments: d2net.ops against the field's O(n^2) C++ extension, numpy and torchvision.

The C++ extension (peers/nms.cpp) is compiled with the system's compiler when the benchmark starts; without one it is
left out. Detections are synthetic, of two kinds: "random" has random segments, durations log-uniform from 0.5 to 60 s;
"dense" has what a dense anchor-free head gives: nine in ten are jittered copies of a true segment, which score higher
the less they differ from it. Both fill a 200 s video with 2,000 detections; more of them make a longer video or, where
the name says so, a denser one.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import OURS, Case, main
from torch import Tensor

from d2net.ops import batched_nms_1d, nms_1d, soft_nms_1d
from d2net.ops.nms import batched_nms_1d_ref, nms_1d_ref, soft_nms_1d_ref

THRESHOLD = 0.5
SOFT = {"iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.001}
SLOW = "C++ O(n^2)"


def detections(kind: str, n: int, seconds: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)

    def uniform(low: float, high: float, size: int = n) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    center, length = uniform(0, seconds), 0.5 * 120 ** uniform(0, 1)
    scores = uniform(0, 1)
    if kind == "dense":
        true = torch.randint(max(1, int(seconds / 10)), (n,), generator=generator)  # one action in ten seconds
        shift, stretch = 0.15 * torch.randn(n, generator=generator), 0.2 * torch.randn(n, generator=generator)
        copy = uniform(0, 1) < 0.9
        center = torch.where(copy, center[true] + shift * length[true], center)
        length = torch.where(copy, length[true] * stretch.exp(), length)
        scores = scores * torch.where(copy, torch.exp(-10 * (shift**2 + stretch**2)), 0.1)
    return torch.stack([center - length / 2, center + length / 2], 1), scores


@functools.cache
def extension() -> ctypes.CDLL | None:
    """The O(n^2) C++ functions, compiled; None, with a message, where there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print(f"no C++ compiler found: {SLOW} is left out")
        return None
    source = Path(__file__).parent / "peers" / "nms.cpp"
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "peer.so"
        subprocess.run([compiler, "-O3", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
    pointer, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.peer_nms_1d.argtypes = [pointer, pointer, pointer, size, real, pointer]
    library.peer_soft_nms_1d.argtypes = [pointer] * 4 + [size, real, real, real, ctypes.c_int]
    for function in (library.peer_nms_1d, library.peer_soft_nms_1d):
        function.restype = size
    return library


def extension_nms(library: ctypes.CDLL, segments: Tensor, scores: Tensor) -> Tensor:
    order = scores.sort(descending=True).indices
    start, end = segments[:, 0].contiguous(), segments[:, 1].contiguous()
    keep = torch.empty(len(order), dtype=torch.int64)
    arrays = (start.data_ptr(), end.data_ptr(), order.data_ptr())
    return keep[: library.peer_nms_1d(*arrays, len(order), THRESHOLD, keep.data_ptr())]


def extension_soft_nms(library: ctypes.CDLL, segments: Tensor, scores: Tensor, method: str) -> tuple[Tensor, Tensor]:
    arrays = (segments[:, 0].clone(), segments[:, 1].clone(), scores.clone(), torch.arange(len(scores)))
    kept = library.peer_soft_nms_1d(
        *(x.data_ptr() for x in arrays), len(scores), *SOFT.values(), int(method == "gaussian")
    )
    return arrays[3][:kept], arrays[2][:kept]


def numpy_nms(segments: np.ndarray, scores: np.ndarray) -> list[int]:
    """As most repositories of the field write it."""
    start, end = segments[:, 0], segments[:, 1]
    length = end - start
    order = scores.argsort()[::-1]
    keep = []
    while order.size > 0:
        i, rest = order[0], order[1:]
        keep.append(i)
        shared = np.maximum(0.0, np.minimum(end[i], end[rest]) - np.maximum(start[i], start[rest]))
        order = rest[shared / (length[i] + length[rest] - shared) < THRESHOLD]
    return keep


def group_loop(nms: Callable[[Tensor, Tensor], Tensor], segments: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
    """NMS class by class and video by video, as research code has it."""
    keep = []
    for group in groups.unique():
        members = torch.nonzero(groups == group).flatten()
        keep.append(members[nms(segments[members], scores[members])])
    found = torch.cat(keep)
    return found[scores[found].argsort(descending=True)]


def torchvision_nms() -> Callable[[Tensor, Tensor], Tensor] | None:
    try:
        from torchvision.ops import nms
    except ImportError:
        return None

    def run(segments: Tensor, scores: Tensor) -> Tensor:
        start, end = segments.unbind(1)
        return nms(torch.stack([start, torch.zeros_like(start), end, torch.ones_like(end)], 1), scores, THRESHOLD)

    return run


def greedy(device: torch.device, name: str, kind: str, n: int, seconds: float, plotted: bool) -> Case:
    segments, scores = (x.to(device) for x in detections(kind, n, seconds))
    contenders: dict[str, Callable[[], object]] = {OURS: partial(nms_1d, segments, scores, THRESHOLD)}
    if (vision := torchvision_nms()) and n <= 20_000:
        contenders["torchvision"] = partial(vision, segments, scores)
    if n <= 20_000:
        contenders["reference"] = partial(nms_1d_ref, segments, scores, THRESHOLD)
        if device.type == "cpu":
            contenders["numpy"] = partial(numpy_nms, segments.numpy(), scores.numpy())
    if device.type == "cpu" and n <= 100_000 and (library := extension()):
        contenders[SLOW] = partial(extension_nms, library, segments, scores)
        # Compared without order: torch's sort leaves that of equal scores open.
        assert n > 20_000 or torch.equal(*(contenders[name]().sort().values for name in (OURS, SLOW)))
    slow = frozenset(contenders if n > 20_000 else ["reference", "numpy"] if n > 2_000 else []) - {OURS}
    return Case(f"nms {name}", contenders, bytes=12 * n, size=n if plotted else None, once=slow)


def soft(device: torch.device, kind: str, n: int, method: str) -> Case:
    segments, scores = (x.to(device) for x in detections(kind, n, 200))
    contenders: dict[str, Callable[[], object]] = {OURS: partial(soft_nms_1d, segments, scores, **SOFT, method=method)}
    if device.type == "cpu" and (library := extension()):
        contenders[SLOW] = partial(extension_soft_nms, library, segments, scores, method)
    if n <= 2_000:
        contenders["reference"] = partial(soft_nms_1d_ref, segments, scores, **SOFT, method=method)
    slow = frozenset(contenders) - {OURS} if n > 2_000 else frozenset(["reference"])
    return Case(f"soft {method} {kind} {n}", contenders, bytes=12 * n, once=slow)


def batched(device: torch.device, videos: int, classes: int, each: int) -> Case:
    parts = [detections("dense", each, 200) for _ in range(classes)]
    segments = torch.cat([p[0] for p in parts] * videos).to(device)
    scores = torch.cat([p[1] for p in parts] * videos).to(device)
    groups = torch.arange(videos * classes, device=device).repeat_interleave(each)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randperm(len(scores), generator=generator).to(device)
    segments, scores, groups = segments[mixed], scores[mixed], groups[mixed]
    contenders: dict[str, Callable[[], object]] = {OURS: partial(batched_nms_1d, segments, scores, groups, THRESHOLD)}
    if device.type == "cpu" and (library := extension()):
        nms = partial(extension_nms, library)
        contenders[f"{SLOW}, group by group"] = partial(group_loop, nms, segments, scores, groups)
    contenders["reference"] = partial(batched_nms_1d_ref, segments, scores, groups, THRESHOLD)
    return Case(
        f"batched {videos} videos x {classes} classes x {each}",
        contenders,
        bytes=20 * len(scores),
        once=frozenset(contenders) - {OURS},
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    sizes = [200, 2_000] if quick else [200, 2_000, 20_000]
    for kind in ("random", "dense"):
        for n in sorted([50, 1_000, *sizes], reverse=True):
            yield greedy(device, f"{kind} {n} in 200 s", kind, n, 200, plotted=False)
    for n in sizes if quick else [*sizes, 100_000, 1_000_000]:
        yield greedy(device, f"random {n} in {n // 10} s", "random", n, n / 10, plotted=True)
    for method in ("linear", "gaussian"):
        for kind in ("random", "dense"):
            for n in sizes:
                yield soft(device, kind, n, method)
    yield batched(device, 1, 20, 50)
    yield batched(device, 2 if quick else 20, 20, 100)


if __name__ == "__main__":
    main("nms_1d", cases, __doc__)
