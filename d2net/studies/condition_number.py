"""Condition number against determinant of joint distribution matrices (the paper's Fig. 3).

pDMI (Eq. 7) minimises the condition number of U where DMI (Eq. 5) maximises |det U|. This samples random matrices and
collects those that a training meets, and says how closely the two follow each other.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from d2net.errors import InputError
from d2net.files import locked, write_whole
from d2net.losses import D2NetLoss, bottom_up_attention
from d2net.ops.packed import padded
from d2net.ops.topk_pool import topk_pool
from d2net.report.names import fit, fonts_for
from d2net.report.pictures import save_figure
from d2net.training import Trainer

__all__ = [
    "Points",
    "draw",
    "joint_matrices",
    "measure",
    "sample_points",
    "summarise",
    "training_points",
    "write_study",
]

RANK_TOLERANCE = 1e-5  # singular values up to this count as zero, as in d2net.ops.log_condition_number
CHUNK = 2**20  # elements of the random matrices made at once
COLOURS = {"random": "#4d4d4d", "snippet": "#2f6db5", "video": "#d55e00"}
TITLES = {
    "random": "randomly sampled",
    "snippet": "snippet level, $\\mathbf{U}_1$ (Eq. 9)",
    "video": "video level, $\\mathbf{U}_2$ (Eq. 10)",
}
SHOWN = 20_000  # points of a cloud in the figure; more only make the file large


@dataclass(frozen=True)
class Points:
    """Condition numbers and determinants of N matrices U (C, C), as logarithms: determinants of large ones underflow.

    Attributes:
        classes: C.
        log_condition: (N,) log(sigma_1 / sigma_r), sigma_r the smallest singular value that is not zero (Eq. 7).
        log_determinant: (N,) log |det U|; -inf where U is singular.
        rank: (N,) singular values above ``RANK_TOLERANCE``.
    """

    classes: int
    log_condition: np.ndarray
    log_determinant: np.ndarray
    rank: np.ndarray

    def __len__(self) -> int:
        return len(self.rank)

    @property
    def full_rank(self) -> np.ndarray:
        """(N,) bool. Of the others the determinant is 0, which is why the paper minimises the condition number."""
        return (self.rank == self.classes) & np.isfinite(self.log_determinant)


def measure(u: np.ndarray) -> Points:
    """Condition numbers and determinants of matrices (N, C, C)."""
    sigma = np.linalg.svd(np.asarray(u, np.float64), compute_uv=False)
    rank = (sigma > RANK_TOLERANCE).sum(axis=1)
    proper = rank > 1
    last = np.take_along_axis(sigma, np.maximum(rank - 1, 0)[:, None], axis=1)[:, 0]
    ratio = np.where(proper, sigma[:, 0], 1) / np.where(proper, last, 1)
    with np.errstate(divide="ignore"):
        # The product of the singular values is |det U|.
        return Points(u.shape[2], np.log(ratio), np.log(sigma).sum(axis=1), rank)


def join(parts: Sequence[Points]) -> Points:
    """Points of several calls of :func:`measure`, at least one."""
    return Points(
        parts[0].classes,
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("log_condition", "log_determinant", "rank")),
    )


def check_sampling(samples: int, classes: int) -> None:
    """Raise InputError for too few samples or classes."""
    if samples < 2:
        raise InputError(f"--samples {samples}: no samples to compare; give at least 2 (the paper took 25000)")
    if classes < 2:
        raise InputError(f"--classes {classes}: a joint distribution needs at least 2 classes")


def sample_points(
    samples: int, classes: int, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Points:
    """Random joint distributions: entries that are not negative and sum to 1, all such matrices equally likely.

    Args:
        samples: How many, at least 2.
        classes: C, at least 2.
        seed: Of the sampling.
        progress: Called with (sampled, all).

    Raises:
        InputError: as :func:`check_sampling`.
    """
    check_sampling(samples, classes)
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // classes**2)
    parts: list[Points] = []
    for start in range(0, samples, size):
        count = min(size, samples - start)
        # Exponential entries over their sum are uniform on the simplex.
        u = rng.exponential(size=(count, classes, classes))
        parts.append(measure(u / u.sum(axis=(1, 2), keepdims=True)))
        if progress is not None:
            progress(start + count, samples)
    return join(parts)


def training_points(trainer: Trainer) -> dict[str, Points]:
    """Run a training and measure the matrices that its denoising loss meets.

    Returns:
        ``snippet``: U_1 (Eq. 9) of every recording of every batch that has pseudo-foreground and pseudo-background;
        ``video``: U_2 (Eq. 10) of every batch. One that was never met is left out.

    Raises:
        InputError, D2NetError, KeyboardInterrupt: as :meth:`d2net.training.Trainer.run`.
    """
    found: dict[str, list[Points]] = {"snippet": [], "video": []}

    def look(loss: D2NetLoss, inputs: tuple[Tensor, ...], named: dict[str, Any], _: object) -> None:
        packed_tcam, packed_embeddings, lengths, labels = (x.detach() for x in inputs[:4])
        rows = named["offsets"], lengths, named["max_length"]
        tcam, embeddings = padded(packed_tcam, *rows), padded(packed_embeddings, *rows)
        # The loss has updated x_ref and then used it, so these are the matrices of the loss.
        for name, u in joint_matrices(
            tcam, embeddings, lengths, labels, loss.reference, topk_divisor=loss.recipe.topk_divisor
        ).items():
            if len(u):
                found[name].append(measure(u.cpu().numpy()))

    handle = trainer.loss.register_forward_hook(look, with_kwargs=True)
    try:
        trainer.run()
    finally:
        handle.remove()
    return {name: join(parts) for name, parts in found.items() if parts}


def joint_matrices(
    tcam: Tensor, embeddings: Tensor, lengths: Tensor | None, labels: Tensor, x_ref: Tensor, *, topk_divisor: int
) -> dict[str, Tensor]:
    """The joint distributions of one batch.

    Args:
        tcam: (B, T, C) in [0, 1].
        embeddings: (B, T, D).
        lengths: (B,), or None (all T).
        labels: (B, C) multi-hot.
        x_ref: (D,) of Eq. 8.
        topk_divisor: Of the pooling that gives p.

    Returns:
        ``snippet``: (N, 2, 2) float64, U_1 = P_1 Y_1 of the N recordings with pseudo-foreground and -background.
        ``video``: (1, C, C) float64, U_2 = P_2 Y_2.
    """
    tcam = tcam.double()
    batch, snippets, _ = tcam.shape
    valid = torch.ones(batch, snippets, dtype=torch.bool, device=tcam.device)
    if lengths is not None:
        valid = torch.arange(snippets, device=tcam.device) < lengths[:, None]
    scores = bottom_up_attention(embeddings, x_ref)
    chosen = torch.stack([valid & (scores > 0.5), valid & (scores < 0.5)], 2).double()
    attention = tcam.masked_fill(~valid[:, :, None], 0).amax(2)
    both = (chosen.sum(1) > 0).all(1)
    u_1 = torch.stack([attention, 1 - attention], 1) @ chosen / chosen.sum((1, 2)).clamp(min=1)[:, None, None]
    p = topk_pool(tcam.masked_fill(~valid[:, :, None], 0), lengths, divisor=topk_divisor)
    return {"snippet": u_1[both], "video": (p.T @ labels.double() / batch)[None]}


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rank correlation; equal values share their mean rank. None where it is not defined."""
    if len(x) < 2:
        return None
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else None


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse]


def summarise(points: Mapping[str, Points]) -> dict[str, dict[str, Any]]:
    """For each kind of matrix: their number, that of the singular ones, and Spearman's correlation over the others."""
    return {
        name: {
            "classes": p.classes,
            "matrices": len(p),
            "singular": int((~p.full_rank).sum()),
            "spearman": spearman(p.log_condition[p.full_rank], p.log_determinant[p.full_rank]),
        }
        for name, p in points.items()
    }


def write_study(out: Path, points: Mapping[str, Points], settings: Mapping[str, Any], name: str) -> list[Path]:
    """Write ``points.csv``, ``summary.json``, ``figure.png`` and ``figure.pdf``; returns their paths.

    Args:
        out: Folder; made where it is missing.
        points: By kind: ``random``, and ``snippet`` and ``video`` where a training was watched.
        settings: What to say in the summary besides the numbers.
        name: Of the training's data, for the figure; empty where none was watched.

    Raises:
        InputError: a file cannot be written, or another d2net writes in ``out``.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["kind", "classes", "rank", "log_condition_number", "log_abs_determinant"])
    for kind, p in points.items():
        for rank, condition, determinant in zip(p.rank, p.log_condition, p.log_determinant, strict=True):
            writer.writerow([kind, p.classes, rank, f"{condition:.8g}", f"{determinant:.8g}"])
    summary = json.dumps({**settings, "results": summarise(points)}, indent=1) + "\n"
    with locked(out), fonts_for([name]):
        for file_name, content in (("points.csv", text.getvalue()), ("summary.json", summary)):
            write_whole(out / file_name, content)
        figure = draw(points, name)
        for suffix in ("png", "pdf"):
            save_figure(out / f"figure.{suffix}", figure, 300)
    return [out / n for n in ("points.csv", "summary.json", "figure.png", "figure.pdf")]


def draw(points: Mapping[str, Points], name: str) -> Figure:
    """Fig. 3: the random matrices on the left, those of the training on the right, both axes logarithmic."""
    trained = {kind: p for kind, p in points.items() if kind != "random"}
    figure = Figure(figsize=(7.0 if trained else 3.6, 2.9), layout="constrained")
    panels = figure.subplots(1, 2 if trained else 1, squeeze=False)[0]
    _panel(panels[0], {"random": points["random"]}, "random U")
    if trained:
        _panel(panels[1], trained, f"U met in training on {fit(name, 1.5, 8.5, bold=True)}")
    panels[0].set_ylabel("condition number  $\\log_{10}\\,\\eta_{\\mathbf{U}}$", fontsize=8.5)
    return figure


def _panel(ax: Axes, points: Mapping[str, Points], title: str) -> None:
    rng = np.random.default_rng(0)  # only picks what is drawn of a large cloud
    for kind, p in points.items():
        full = np.flatnonzero(p.full_rank)
        shown = rng.permutation(full)[:SHOWN]
        rho = spearman(p.log_condition[full], p.log_determinant[full])
        said = "" if rho is None else f"\nSpearman {rho:.3f}".replace("-", "\N{MINUS SIGN}")
        ax.scatter(
            p.log_determinant[shown] / np.log(10),
            p.log_condition[shown] / np.log(10),
            s=2.5,
            alpha=0.25 if len(shown) > 2000 else 0.6,
            color=COLOURS[kind],
            linewidths=0,
            rasterized=True,  # tens of thousands of vector dots would make the PDF slow
            label=f"{TITLES[kind]}, {p.classes}×{p.classes}{said}",
        )
    ax.set_title(title, loc="left", fontsize=8.5, fontweight="bold", parse_math=False)
    ax.set_xlabel("determinant  $\\log_{10}\\,|\\det(\\mathbf{U})|$", fontsize=8.5)
    ax.tick_params(labelsize=7.5, length=2.5, width=0.6)
    ax.grid(color="#e4e4e4", lw=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    low, high = ax.get_ylim()
    taken = 0.05 + 0.15 * len(points)  # of the height: the legend's, which hides no point up there
    ax.set_ylim(low, low + (high - low) / (1 - taken))
    legend = ax.legend(fontsize=7, loc="upper right", markerscale=3, frameon=False)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
