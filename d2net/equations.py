"""The paper on one page: Eq. 1 to 11 and Sec. 3.3 in plain PyTorch, one recording at a time.

Written to be read, and to test the rest of the package against: slow, without batches or padding, and without care for
rounding or overflow. Autograd differentiates everything except :func:`localize`.

Shapes: s snippets, C classes, D the width of the embeddings, n recordings of a batch. Where the paper leaves a case
open, the text says what is done here, and the fast operators do the same. docs/fidelity.md lists where the authors'
released code differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "THRESHOLDS", "attention", "bottom_up_attention", "class_activations", "class_scores", "components",
    "contrast", "cosine", "denoising_losses", "discriminative_loss", "dmi_loss", "foreground_and_background",
    "iou", "localize", "pdmi_loss", "separation_weights", "snippet_joint", "total_loss", "update_x_ref",
    "video_joint",
]  # fmt: skip

# --- The network's head (Fig. 2) --------------------------------------------------------------------------------------


def class_activations(logits_rgb: Tensor, logits_flow: Tensor) -> Tensor:
    """T = (sigmoid(rgb) + sigmoid(flow)) / 2: the TCAM (s, C) from the last layers of both streams, (s, C) each."""
    return (logits_rgb.sigmoid() + logits_flow.sigmoid()) / 2


def attention(tcam: Tensor) -> Tensor:
    """lambda(t) = max_c T[t, c]: the top-down foreground attention (s,). The background attention is 1 - lambda(t)."""
    return tcam.max(1).values


def class_scores(tcam: Tensor, divisor: int = 8) -> Tensor:
    """p[c] = mean of the k largest T[t, c] over t, k = ceil(s / 8): the recording-level prediction (C,)."""
    k = math.ceil(len(tcam) / divisor)
    return tcam.sort(dim=0, descending=True, stable=True).values[:k].mean(0)


# --- Sec. 3.1, the discriminative loss --------------------------------------------------------------------------------


def foreground_and_background(tcam: Tensor, x: Tensor, tau: float = 0.5) -> tuple[Tensor | None, Tensor | None]:
    """Eq. 2: x_fg = sum over lambda(t) > tau of lambda(t) x(t); x_bg likewise with 1 - lambda(t).

    Args:
        tcam: (s, C).
        x: (s, D) latent embeddings.
        tau: Threshold on both attentions.

    Returns:
        (D,) each; None where no snippet is above the threshold.
    """
    fg = attention(tcam)
    bg = 1 - fg
    x_fg = (fg[:, None] * x)[fg > tau].sum(0) if (fg > tau).any() else None
    x_bg = (bg[:, None] * x)[bg > tau].sum(0) if (bg > tau).any() else None
    return x_fg, x_bg


def cosine(u: Tensor, v: Tensor) -> Tensor:
    """cos(u, v) of two vectors (D,)."""
    return u @ v / (u.norm() * v.norm())


def separation_weights(
    x_fg: Tensor | None,
    x_bg: Tensor | None,
    other_fg: Tensor | None,
    other_bg: Tensor | None,
    gamma: float = 0.01,
) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
    """Eq. 3: w_fb = max(0, cos(x_fg, x~_bg)), w_fg = gamma (1 - cos(x_fg, x~_fg)), w_bg = gamma (1 - cos(x_bg, x~_bg)).

    Args:
        x_fg: (D,) foreground embedding of this recording, or None.
        x_bg: (D,) its background embedding, or None.
        other_fg: (D,) x~_fg, the foreground embedding of another recording of the batch, or None.
        other_bg: (D,) x~_bg, the background embedding of another recording of the batch, or None.
        gamma: Intra-class compactness.

    Returns:
        w_fb, w_fg, w_bg; 0 where one of the two embeddings is None.
    """
    w_fb = 0.0 if x_fg is None or other_bg is None else cosine(x_fg, other_bg).clamp(min=0)
    w_fg = 0.0 if x_fg is None or other_fg is None else gamma * (1 - cosine(x_fg, other_fg))
    w_bg = 0.0 if x_bg is None or other_bg is None else gamma * (1 - cosine(x_bg, other_bg))
    return w_fb, w_fg, w_bg


def discriminative_loss(
    p: Tensor,
    y: Tensor,
    w_fb: Tensor | float = 0.0,
    w_fg: Tensor | float = 0.0,
    w_bg: Tensor | float = 0.0,
    beta: float = 2.0,
) -> Tensor:
    """Eq. 4: L_Dis = - sum over y[c] = 1 of (1 - p[c] + w_fg + w_fb)^beta log p[c]
    - sum over y[c] = 0 of (p[c] + w_bg + w_fb)^beta log(1 - p[c]).

    With all weights 0 it is the focal loss of Table 3; with beta = 0 as well it is the cross-entropy of Table 3.

    Args:
        p: (C,) class scores in (0, 1).
        y: (C,) labels, 0 or 1.
        w_fb: Weight of Eq. 3.
        w_fg: Weight of Eq. 3.
        w_bg: Weight of Eq. 3.
        beta: Focusing parameter.

    Returns:
        Scalar, of one recording. The loss of a batch is the mean over its recordings.
    """
    q = 1 - p
    positive = (q + w_fg + w_fb) ** beta * p.log()
    negative = (p + w_bg + w_fb) ** beta * q.log()
    return -positive[y == 1].sum() - negative[y == 0].sum()


# --- Sec. 3.2, the denoising loss -------------------------------------------------------------------------------------


def dmi_loss(p: Tensor, y: Tensor) -> Tensor:
    """Eq. 5: L_dmi = -log |det U|, U = P Y / n, from predictions P (C, n) and labels Y (n, C)."""
    return -(p @ y / p.shape[1]).det().abs().log()


# Eq. 6: L_dmi -> 0 implies |det U| -> 1 implies U -> I. The identity has the smallest possible condition number, 1. So
# instead of maximising the determinant, Eq. 7 minimises the condition number.


def pdmi_loss(u: Tensor, rank_tol: float = 1e-5) -> Tensor:
    """Eq. 7: L_pdmi = log(eta_U), eta_U = sigma_1 / sigma_r of a joint distribution U (R, C).

    Args:
        u: U = P Y.
        rank_tol: sigma_r is the smallest singular value above it.

    Returns:
        Scalar; 0 for rank 0 or 1.
    """
    sigma = torch.linalg.svdvals(u)
    nonzero = sigma[sigma > rank_tol]
    return (nonzero[0] / nonzero[-1]).log() if len(nonzero) else 0 * sigma.sum()


def bottom_up_attention(x: Tensor, x_ref: Tensor) -> Tensor:
    """Eq. 8: lambda'(t) = 0.5 (1 - cos(x(t), x_ref)): foreground scores (s,) of embeddings x (s, D)."""
    return torch.stack([0.5 * (1 - cosine(x_t, x_ref)) for x_t in x])


def update_x_ref(x_ref: Tensor, backgrounds: Sequence[Tensor | None], momentum: float = 0.9) -> Tensor:
    """Below Eq. 8: x_ref = 0.9 x_ref + 0.1 x_bg^mu, where x_bg^mu is the mean of the x_bg (D,) of a batch.

    If no recording of the batch has a background embedding, x_ref stays the same. It carries no gradient.
    """
    present = [x_bg.detach() for x_bg in backgrounds if x_bg is not None]
    return momentum * x_ref + (1 - momentum) * torch.stack(present).mean(0) if present else x_ref


def snippet_joint(tcam: Tensor, scores: Tensor) -> Tensor | None:
    """Eq. 9: U_1 = P_1 Y_1, P_1 = [lambda_f lambda_b; 1 - lambda_f 1 - lambda_b], Y_1 = 1/z [1 0; 0 1].

    Args:
        tcam: (s, C); lambda is its top-down attention.
        scores: (s,) bottom-up attention lambda'(t). t_f are the snippets with scores above 0.5, t_b those below.

    Returns:
        (2, 2); None where there are no t_f or no t_b.
    """
    top_down = attention(tcam)
    fg, bg = top_down[scores > 0.5], top_down[scores < 0.5]
    if len(fg) == 0 or len(bg) == 0:
        return None
    row = torch.cat((fg, bg))
    p_1 = torch.stack((row, 1 - row))  # (2, z)
    y_1 = torch.zeros(len(row), 2, dtype=row.dtype)  # (z, 2)
    y_1[: len(fg), 0] = 1
    y_1[len(fg) :, 1] = 1
    return p_1 @ y_1 / len(row)


def video_joint(p: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Eq. 10: U_2 = P_2 Y_2 (C, C), P_2 = [p_1 ... p_n], Y_2 = 1/n [y_1 ... y_n]^T, p_i and y_i (C,)."""
    return torch.stack(tuple(p), 1) @ torch.stack(tuple(y)) / len(p)


def denoising_losses(
    tcams: Sequence[Tensor], embeddings: Sequence[Tensor], labels: Sequence[Tensor], x_ref: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. 11: L_D = L_DS + L_DV, of a batch.

    Args:
        tcams: (s, C) of each recording.
        embeddings: (s, D) of each recording.
        labels: (C,) of each recording.
        x_ref: (D,).

    Returns:
        L_DS, the mean over the recordings that have a U_1 (0 if none has), and L_DV.
    """
    joints = [snippet_joint(t, bottom_up_attention(x, x_ref)) for t, x in zip(tcams, embeddings, strict=True)]
    terms = [pdmi_loss(u) for u in joints if u is not None]
    snippet = torch.stack(terms).mean() if terms else 0 * tcams[0].sum()
    return snippet, pdmi_loss(video_joint([class_scores(t) for t in tcams], labels))


def total_loss(
    tcams: Sequence[Tensor],
    embeddings: Sequence[Tensor],
    labels: Sequence[Tensor],
    partners: Sequence[int],
    x_ref: Tensor,
    *,
    alpha: float = 0.2,
    beta: float = 2.0,
    gamma: float = 0.01,
    tau: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Eq. 1: L = L_Dis + alpha L_D, of a batch.

    Args:
        tcams: (s, C) of each recording.
        embeddings: (s, D) of each recording.
        labels: (C,) of each recording.
        partners: For each recording, the index of the other recording that x~ of Eq. 3 comes from.
        x_ref: (D,) from the iteration before.
        alpha: Weight of L_D.
        beta: Of Eq. 4.
        gamma: Of Eq. 3.
        tau: Of Eq. 2.

    Returns:
        L, and the updated x_ref, which L_D uses already.
    """
    pooled = [foreground_and_background(t, x, tau) for t, x in zip(tcams, embeddings, strict=True)]
    discriminative = [
        discriminative_loss(class_scores(t), y, *separation_weights(*own, *pooled[j], gamma), beta)
        for t, y, own, j in zip(tcams, labels, pooled, partners, strict=True)
    ]
    x_ref = update_x_ref(x_ref, [x_bg for _, x_bg in pooled])
    snippet, video = denoising_losses(tcams, embeddings, labels, x_ref)
    return torch.stack(discriminative).mean() + alpha * (snippet + video), x_ref


# --- Sec. 3.3, inference ----------------------------------------------------------------------------------------------


THRESHOLDS = [0.025 * i for i in range(1, 21)]  # Sec. 4


def localize(
    tcam: Tensor,
    scores: Tensor,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    inflation: float = 0.25,
    nms_iou: float = 0.5,
    score_floor: float = 0.1,
) -> list[tuple[int, int, int, float]]:
    """Sec. 3.3: from a TCAM to the detections of one recording.

    Args:
        tcam: T (s, C).
        scores: lambda'(t) (s,) of Eq. 8.
        thresholds: The proposals are the components of the snippets above each of these.
        inflation: Width of the neighbourhood on either side, as a fraction of a proposal's width; at least one snippet.
        nms_iou: Of two proposals of a class with an IoU of at least this, the one with the higher score stays.
        score_floor: S_th, as a fraction of the recording's highest score.

    Returns:
        (class, start, end, score) in snippets, with an exclusive end; by class and falling score.
    """
    p = class_scores(tcam)
    detections: list[tuple[int, int, int, float]] = []
    for c in range(tcam.shape[1]):
        if p[c] <= 0.5 * p.max():  # p_th
            continue
        r = scores * tcam[:, c]  # r_c = lambda' T_c
        segments = {segment for threshold in thresholds for segment in components(r > threshold)}
        scored = [(contrast(r, start, end, inflation), start, end) for start, end in segments]
        kept: list[tuple[float, int, int]] = []
        for score, start, end in sorted(scored, key=lambda found: (-found[0], found[1], found[2])):
            if all(iou((start, end), other[1:]) < nms_iou for other in kept):
                kept.append((score, start, end))
        detections += [(c, start, end, score) for score, start, end in kept]
    best = max((score for *_, score in detections), default=0.0)
    return [found for found in detections if found[3] > max(score_floor * best, 0.0)]


def components(above: Tensor) -> list[tuple[int, int]]:
    """1-D connected components of a mask (s,): [start, end) of every run of True."""
    found, start = [], None
    for t, inside in enumerate([*above.tolist(), False]):
        if inside and start is None:
            start = t
        if not inside and start is not None:
            found.append((start, t))
            start = None
    return found


def contrast(r: Tensor, start: int, end: int, inflation: float) -> float:
    """S = S_i - S_o: the mean activation of a proposal minus that of its neighbourhood; S_o is 0 without neighbours."""
    reach = max(1, int(inflation * (end - start)))
    around = torch.cat((r[max(0, start - reach) : start], r[end : end + reach]))
    return float(r[start:end].mean() - (around.mean() if len(around) else 0))


def iou(a: tuple[int, int], b: tuple[int, int]) -> float:
    """Temporal intersection over union of two segments [start, end)."""
    intersection = max(0, min(a[1], b[1]) - max(a[0], b[0]))
    return intersection / ((a[1] - a[0]) + (b[1] - b[0]) - intersection)
