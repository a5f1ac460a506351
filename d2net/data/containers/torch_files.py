"""Files of PyTorch: tensors only, no code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from d2net.data.containers.names import stream_names
from d2net.errors import InputError
from d2net.reading import check_ordinary
from d2net.words import quoted, reason


def load_torch(path: Path, only: str | None) -> dict[str, np.ndarray]:
    """The streams of a file of PyTorch, or only one of them."""
    import torch

    check_ordinary(path)
    _check_sums(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, which could run code when read, so it is not opened; save the tensor "
            f"alone: torch.save(x, '{path.name}')"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); give a readable file") from None
    except Exception as error:  # a damaged file can raise anything
        raise InputError(
            f"{path}: not a readable PyTorch file, truncated perhaps ({reason(error)}); save it again"
        ) from None
    if isinstance(content, torch.Tensor):
        content = {"": content}
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}; save one tensor of shape (T, width)")
    tensors = {str(name): x.detach() for name, x in content.items() if isinstance(x, torch.Tensor)}
    chosen = {s: tensors[key] for s, key in stream_names(tensors, str(path)).items() if only in (None, s)}
    for x in chosen.values():
        if x.layout == torch.strided and not x.is_meta and x.numel() * x.itemsize > x.untyped_storage().nbytes():
            raise InputError(f"{path}: holds a tensor {tuple(x.shape)} that repeats fewer numbers; save x.contiguous()")
    try:
        return {s: (x.float() if x.is_floating_point() else x).numpy() for s, x in chosen.items()}
    except Exception as error:  # sparse, quantized, on no device
        raise InputError(f"{path}: holds no plain tensor ({reason(error)}); save a dense one") from None


def _check_sums(path: Path) -> None:
    """Compare what a file holds with the CRC-32 of each part, which ``torch.load`` does not look at.

    Files from before torch 1.6 are no zip and have none; ``torch.serialization.set_crc32_options(False)`` writes 0.

    Raises:
        InputError: a part is not what was written.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(part.CRC for part in archive.infolist()):
                return
            damaged = archive.testzip()
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path}: damaged ({reason(error)}); save it again, or use another copy") from None
    if damaged is not None:
        raise InputError(
            f"{path}: damaged, the checksum of {quoted(damaged)} in it is wrong; save it again, or use another copy"
        )
