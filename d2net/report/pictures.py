"""Picture files: their formats, and writing them atomically."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from d2net.errors import InputError
from d2net.files import write_whole

FORMATS = ("png", "pdf", "svg")


def check_picture(path: Path) -> str:
    """The format that the suffix of ``path`` asks for. Raises InputError when pictures cannot be written so."""
    kind = path.suffix.lower().lstrip(".")
    if kind not in FORMATS:
        raise InputError(f"{path}: cannot draw a '{path.suffix}' file; name it .png, .pdf or .svg")
    return kind


def save_figure(path: Path, figure: Figure, dpi: int) -> None:
    """Save atomically in the format of the suffix, within :func:`d2net.report.names.fonts_for`.

    Raises:
        InputError: it cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format=check_picture(path), dpi=dpi)
    write_whole(path, content.getvalue())
