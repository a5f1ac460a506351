"""The losses of D2-Net (Eq. 1 to 11) as drop-in modules: plain tensors in, a small named result out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2net.errors import InputError
from d2net.ops._checks import check_same, check_shape, valid_mask
from d2net.ops.attention_pool import attention_pool
from d2net.ops.condition_number import joint_log_condition_number
from d2net.ops.snippet_pdmi import snippet_pdmi
from d2net.ops.topk_pool import topk_pool
from d2net.recipes import LossRecipe, load_recipe

_EPS = 1e-6  # keeps log(p) and log(1 - p) finite when a float32 sigmoid saturates


class D2NetLossResult(NamedTuple):
    """Scalars of one step: total = discriminative + alpha_snippet * snippet + alpha_video * video (Eq. 1, 11)."""

    total: Tensor
    discriminative: Tensor
    snippet: Tensor
    video: Tensor


class Discriminative(NamedTuple):
    """L_Dis (scalar), the batch's mean background embedding (D,) and whether any recording had one (bool)."""

    loss: Tensor
    background: Tensor
    has_background: Tensor


def bottom_up_attention(embeddings: Tensor, reference: Tensor) -> Tensor:
    """Foreground scores lambda'(t) = 0.5 (1 - cos(x(t), x_ref)) (Eq. 8).

    Args:
        embeddings: (B, T, D). reference: (D,), the running background reference x_ref.

    Returns:
        (B, T) in [0, 1]; 0.5 where either vector is zero.
    """
    return 0.5 * (1 - F.cosine_similarity(embeddings, reference.to(embeddings.dtype), dim=2))


def draw_partners(valid: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pair every valid recording with a different one: a random cycle through them.

    Drawn without waiting for the device: invalid recordings sort to the end of the random order.

    Args:
        valid: (B,) bool.

    Returns:
        (B,) int64 partners; the recording itself where it is invalid or the only valid one.
    """
    b = len(valid)
    device = generator.device if generator is not None else valid.device
    keys = torch.rand(b, generator=generator, device=device).to(valid.device)
    order = (keys + (~valid)).argsort()  # keys are below 1
    place = torch.arange(b, device=valid.device)
    count = valid.sum()
    following = torch.where(place < count, (place + 1) % count.clamp(min=1), place)
    return torch.empty_like(order).scatter_(0, order, order[following])


def _check_batch(loss: str, tcam: Tensor, embeddings: Tensor, labels: Tensor) -> None:
    check_shape(loss, "tcam", tcam, "B, T, C")
    check_shape(loss, "embeddings", embeddings, "B, T, D")
    check_same(loss, "tcam", tcam, "embeddings", embeddings, 2)
    if labels.shape != (tcam.shape[0], tcam.shape[2]) or labels.device != tcam.device:
        raise InputError(
            f"{loss}: labels have shape {tuple(labels.shape)} on {labels.device}, expected multi-hot "
            f"({tcam.shape[0]}, {tcam.shape[2]}) on {tcam.device}"
        )


class DiscriminativeLoss(nn.Module):
    """L_Dis: focal classification whose weights separate foreground from background embeddings (Eq. 2-4).

    Args:
        beta: focusing parameter. gamma: intra-class compactness. threshold, background_threshold: tau of Eq. 2.
        topk_divisor: k of the top-k pooling is ceil(length / topk_divisor).
    """

    def __init__(
        self,
        *,
        beta: float = 2.0,
        gamma: float = 0.01,
        threshold: float = 0.5,
        background_threshold: float = 0.5,
        topk_divisor: int = 8,
    ) -> None:
        super().__init__()
        self.beta, self.gamma = beta, gamma
        self.threshold, self.background_threshold = threshold, background_threshold
        self.topk_divisor = topk_divisor

    def forward(
        self,
        tcam: Tensor,
        embeddings: Tensor,
        lengths: Tensor | None,
        labels: Tensor,
        partners: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Discriminative:
        """Sum over classes, mean over the recordings that have a snippet.

        Args:
            tcam: (B, T, C) in [0, 1]. embeddings: (B, T, D). lengths: (B,) int64 or None. labels: (B, C) multi-hot.
            partners: (B,) int64, the recording whose embeddings stand as x~ in Eq. 3, or (3, B) to give one
                for each of w_fb, w_fg, w_bg; a recording paired with itself gets weight 0. None: drawn at random.
            generator: source of that randomness.

        Raises:
            InputError: shapes or devices that do not fit.
        """
        _check_batch("DiscriminativeLoss", tcam, embeddings, labels)
        b = tcam.shape[0]
        mask = valid_mask("DiscriminativeLoss", tcam, lengths)
        tcam = tcam.masked_fill(~mask[:, :, None], 0)
        x = attention_pool(
            embeddings,
            tcam.amax(2),
            lengths,
            threshold=self.threshold,
            background_threshold=self.background_threshold,
        )
        if partners is None:
            everyone = torch.ones_like(x.valid_fg)
            partners = torch.stack([draw_partners(v, generator) for v in (everyone, x.valid_fg, x.valid_bg)])
        elif partners.shape not in ((b,), (3, b)):
            raise InputError(
                f"DiscriminativeLoss: partners has shape {tuple(partners.shape)}, expected ({b},) or (3, {b})"
            )
        fb, fg, bg = partners.expand(3, b)
        w_fb = self._cosine(x.x_fg, x.valid_fg, x.x_bg, x.valid_bg, fb).clamp(min=0)
        w_fg = self._distance(x.x_fg, x.valid_fg, fg)
        w_bg = self._distance(x.x_bg, x.valid_bg, bg)

        p = topk_pool(tcam, lengths, divisor=self.topk_divisor).clamp(_EPS, 1 - _EPS)
        positive = -((1 - p + (w_fg + w_fb)[:, None]) ** self.beta) * p.log()
        negative = -((p + (w_bg + w_fb)[:, None]) ** self.beta) * (1 - p).log()
        per_recording = torch.where(labels > 0, positive, negative).sum(1)
        present = mask.any(1)
        loss = torch.where(present, per_recording, 0).sum() / present.sum().clamp(min=1)

        with torch.no_grad():
            background = x.x_bg.sum(0) / x.valid_bg.sum().clamp(min=1)  # x_bg is 0 where not valid
        return Discriminative(loss, background, x.valid_bg.any())

    @staticmethod
    def _cosine(x: Tensor, valid_x: Tensor, y: Tensor, valid_y: Tensor, partners: Tensor) -> Tensor:
        """(B,) cosine of x and its partner's y; 0 where either is missing or a recording meets itself."""
        different = partners != torch.arange(len(partners), device=partners.device)
        usable = valid_x & valid_y[partners] & different
        return torch.where(usable, F.cosine_similarity(x, y[partners], dim=1), 0)

    def _distance(self, x: Tensor, valid: Tensor, partners: Tensor) -> Tensor:
        """(B,) gamma (1 - cos) to the partner; 0 where there is no pair."""
        different = partners != torch.arange(len(partners), device=partners.device)
        usable = valid & valid[partners] & different
        return torch.where(usable, self.gamma * (1 - F.cosine_similarity(x, x[partners], dim=1)), 0)


class SnippetDenoising(nn.Module):
    """L_DS: mean over recordings of the snippet-level log condition number (Eq. 7-9, 11)."""

    def forward(self, tcam: Tensor, embeddings: Tensor, lengths: Tensor | None, reference: Tensor) -> Tensor:
        """Scalar; recordings without pseudo-foreground or pseudo-background do not count.

        Args:
            tcam: (B, T, C). embeddings: (B, T, D). lengths: (B,) int64 or None. reference: (D,), x_ref.
        """
        mask = valid_mask("SnippetDenoising", tcam, lengths)
        attention = tcam.masked_fill(~mask[:, :, None], 0).amax(2)
        with torch.no_grad():  # the scores only select snippets
            scores = bottom_up_attention(embeddings, reference)
        loss, valid = snippet_pdmi(attention, scores, lengths)
        return loss.sum() / valid.sum().clamp(min=1)


class VideoDenoising(nn.Module):
    """L_DV: log condition number of the batch's joint distribution of predictions and labels (Eq. 7, 10, 11)."""

    def __init__(self, *, topk_divisor: int = 8) -> None:
        super().__init__()
        self.topk_divisor = topk_divisor

    def forward(self, tcam: Tensor, lengths: Tensor | None, labels: Tensor) -> Tensor:
        """Scalar; 0 for fewer than two linearly independent recordings.

        Args:
            tcam: (B, T, C). lengths: (B,) int64 or None. labels: (B, C) multi-hot.
        """
        mask = valid_mask("VideoDenoising", tcam, lengths)
        p = topk_pool(tcam.masked_fill(~mask[:, :, None], 0), lengths, divisor=self.topk_divisor)
        present = mask.any(1, keepdim=True)
        y = labels.to(p.dtype) * present / present.sum().clamp(min=1)
        return joint_log_condition_number(p.T[None], y[None]).sum()


class D2NetLoss(nn.Module):
    """L = L_Dis + alpha (L_DS + L_DV) (Eq. 1), with the running background reference x_ref.

    Example::

        loss = D2NetLoss.from_recipe("thumos14-paper", num_classes=20, embedding_dim=1024)
        loss(tcam, embeddings, lengths, labels).total.backward()

    Args:
        num_classes: C, checked against what comes in.
        embedding_dim: D, width of the buffer ``reference``.
        recipe: weights and thresholds; default THUMOS14's of the paper.

    Attributes:
        reference: (D,) buffer x_ref = 0.9 x_ref + 0.1 mean of the batch's x_bg (below Eq. 8), updated by every
            forward in training mode, before L_DS uses it.
    """

    reference: Tensor

    def __init__(self, num_classes: int, embedding_dim: int, recipe: LossRecipe | None = None) -> None:
        super().__init__()
        recipe = recipe or LossRecipe()
        self.num_classes = num_classes
        self.recipe = recipe
        self.discriminative = DiscriminativeLoss(
            beta=recipe.beta,
            gamma=recipe.gamma,
            threshold=recipe.threshold,
            background_threshold=recipe.background_threshold,
            topk_divisor=recipe.topk_divisor,
        )
        self.snippet = SnippetDenoising()
        self.video = VideoDenoising(topk_divisor=recipe.topk_divisor)
        self.register_buffer("reference", torch.zeros(embedding_dim))

    @classmethod
    def from_recipe(cls, recipe: str | LossRecipe, *, num_classes: int, embedding_dim: int) -> D2NetLoss:
        """The loss of a recipe, given by name or by its values."""
        values = load_recipe(recipe).loss if isinstance(recipe, str) else recipe
        return cls(num_classes, embedding_dim, values)

    def forward(
        self,
        tcam: Tensor,
        embeddings: Tensor,
        lengths: Tensor | None,
        labels: Tensor,
        partners: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> D2NetLossResult:
        """All terms of one batch; finite for any batch of finite inputs.

        Args:
            tcam: (B, T, C) class activations in [0, 1]. embeddings: (B, T, D) latent embeddings x(t).
            lengths: (B,) int64 snippets of each recording, or None (all T). labels: (B, C) multi-hot.
            partners, generator: see :class:`DiscriminativeLoss`.

        Raises:
            InputError: shapes or devices that do not fit.
        """
        _check_batch("D2NetLoss", tcam, embeddings, labels)
        if tcam.shape[2] != self.num_classes or embeddings.shape[2] != len(self.reference):
            raise InputError(
                f"D2NetLoss: tcam has {tcam.shape[2]} classes and embeddings are {embeddings.shape[2]} wide, "
                f"the loss was made for {self.num_classes} and {len(self.reference)}"
            )
        discriminative, background, has_background = self.discriminative(
            tcam, embeddings, lengths, labels, partners, generator
        )
        if self.training:
            momentum = self.recipe.momentum
            updated = momentum * self.reference + (1 - momentum) * background.to(self.reference.dtype)
            self.reference.copy_(torch.where(has_background, updated, self.reference))
        snippet = self.snippet(tcam, embeddings, lengths, self.reference)
        video = self.video(tcam, lengths, labels)
        total = discriminative + self.recipe.alpha_snippet * snippet + self.recipe.alpha_video * video
        return D2NetLossResult(total, discriminative, snippet, video)
