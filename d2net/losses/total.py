"""The whole loss of D2-Net (Eq. 1), with the terms and weights of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from d2net.errors import InputError
from d2net.fields import LARGEST_COUNT, Range
from d2net.losses._common import setting, take_batch
from d2net.losses.comparison import SnippetBCE, SnippetDMI, SnippetL1, VideoBCE, VideoDMI, VideoL1
from d2net.losses.denoising import SnippetDenoising, SnippetTerm
from d2net.losses.discriminative import DiscriminativeLoss
from d2net.losses.pairing import Pairs
from d2net.losses.uncertainty import UncertaintyModeling
from d2net.losses.video_denoising import VideoDenoising, VideoJoint, VideoTerm
from d2net.losses.video_queue import VideoQueue
from d2net.losses.whole_batch import WholeBatch, WholeLoss, loss_of_whole_batch
from d2net.ops.loss import d2net_loss, has_video_kernel
from d2net.ops.loss_ref import LossInputs, LossSettings
from d2net.ops.precision import at_least_float32, kept_in_float32
from d2net.recipes import LossRecipe, load_recipe

Size = Annotated[int, Range(0, LARGEST_COUNT)]


class D2NetLossResult(NamedTuple):
    """Scalars of one step, float32, or float64 where the activations are.

    A term whose weight is 0, or that is off in this step, is not computed and is 0.

    Attributes:
        total: discriminative + alpha_snippet * snippet + alpha_video * video (Eq. 1, 11) + um_weight * uncertainty.
        discriminative: L_Dis.
        snippet: L_DS, before its weight.
        video: L_DV, before its weight.
        uncertainty: UM's loss, before its weight.
    """

    total: Tensor
    discriminative: Tensor
    snippet: Tensor
    video: Tensor
    uncertainty: Tensor


class D2NetLoss(nn.Module):
    """L = L_Dis + alpha (L_DS + L_DV) (Eq. 1); owns the background reference x_ref.

    A recipe can replace the terms with those that the paper compares with (``classification``, ``denoising``).

    Example::

        loss = D2NetLoss.from_recipe("thumos14-paper", num_classes=20, embedding_dim=1024)
        loss(tcam, embeddings, lengths, labels).total.backward()

    Args:
        num_classes: C; batches of another C are refused.
        embedding_dim: D, the width of x_ref.
        recipe: weights and thresholds; None: the paper's for THUMOS14.

    Attributes:
        reference: (D,) buffer, x_ref. Every forward in training mode updates it before L_DS uses it: x_ref = 0.9 x_ref
            + 0.1 mean of the batch's x_bg (below Eq. 8). At least float32, also after ``loss.half()``: a sum over time
            exceeds the largest float16. Localization takes x_ref from the network. To share one tensor, set
            ``loss.reference = model.x_ref`` after both were moved to their device.
        queue: The recordings before the batch, for L_DV (``loss.video_queue``), to which every forward in training mode
            adds those of the batch; None where the recipe has none.

    Raises:
        InputError: a size that is no whole number, a recipe that is no LossRecipe (give the ``loss`` of a whole
            recipe), or one whose snippets could be foreground and background at once.
    """

    reference: Tensor

    def __init__(self, num_classes: int, embedding_dim: int, recipe: LossRecipe | None = None) -> None:
        super().__init__()
        self.num_classes: int = setting(self, Size, num_classes=num_classes)
        embedding_dim = setting(self, Size, embedding_dim=embedding_dim)
        recipe = setting(self, LossRecipe | None, recipe=recipe) or LossRecipe()
        self.recipe: LossRecipe = recipe
        self.discriminative = DiscriminativeLoss(
            beta=recipe.beta,
            gamma=recipe.gamma,
            threshold=recipe.threshold,
            background_threshold=recipe.background_threshold,
            threshold_inclusive=recipe.threshold_inclusive,
            embedding_pooling=recipe.embedding_pooling,
            pairing=recipe.pairing,
            topk_divisor=recipe.topk_divisor,
            probability_floor=recipe.probability_floor,
            class_reduction=recipe.class_reduction,
            balance_classes=recipe.balance_classes,
        )
        self.snippet, self.video = _denoising(recipe)
        self.queue: VideoQueue | None = None
        if recipe.video_queue and recipe.alpha_video != 0 and isinstance(self.video, VideoJoint):
            self.queue = VideoQueue(recipe.video_queue, self.num_classes)
        self.uncertainty = UncertaintyModeling(
            magnitude=recipe.um_magnitude, margin=recipe.um_margin, margin_unit=recipe.um_margin_unit
        )
        off_on = (False, True)
        self._settings = {(train, denoise): self._settings_of(train, denoise) for train in off_on for denoise in off_on}
        self.register_buffer("reference", at_least_float32(torch.zeros(embedding_dim)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> D2NetLoss:
        kept = self.reference
        super()._apply(fn, recurse)
        self.reference = kept_in_float32(kept, self.reference)
        return self

    @classmethod
    def from_recipe(cls, recipe: str | LossRecipe, *, num_classes: int, embedding_dim: int) -> D2NetLoss:
        """The loss of a recipe.

        Args:
            recipe: The name of a recipe, or its loss settings.
            num_classes: C.
            embedding_dim: D.

        Raises:
            InputError: an unknown name, or as the class says.
        """
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
        *,
        logits: Tensor | None = None,
        denoise: bool = True,
        offsets: Tensor | None = None,
        max_length: int | None = None,
        whole: WholeBatch | None = None,
    ) -> D2NetLossResult:
        """All terms of one batch; finite for any batch of finite inputs, half precision too (docs/numbers.md).

        Args:
            tcam: (B, T, C) class activations in [0, 1]; (N, C) with ``offsets``.
            embeddings: (B, T, D) latent embeddings x(t), or (N, D).
            lengths: (B,) int64, the number of snippets of each recording, or None (all T).
            labels: (B, C) multi-hot.
            partners: see :meth:`DiscriminativeLoss.forward`.
            generator: see there.
            logits: (B, T, C) class logits, or (N, C), which the term of UM (``um_weight``) needs and no other:
                ``output.logits``.
            denoise: whether L_D is on in this step (``training.denoising_start`` and ``denoising_every``).
            offsets: (B+1,) int64, the first row of each recording in a packed batch (:mod:`d2net.losses`).
            max_length: Of a packed batch, an upper bound of the lengths; None: see :mod:`d2net.losses`.
            whole: The batch that these recordings are a part of, where others lie on other ranks
                (:mod:`d2net.losses.whole_batch`). The loss is that of the whole batch then, the same on all ranks, and
                the gradients of weights must be added up over the ranks. None: these are the batch.

        Raises:
            InputError: shapes or devices that do not fit, no ``logits`` where ``um_weight`` is not 0; and, on a CPU
                only, logits as ``tcam``, labels that are NaN, or ``partners`` that are not as
                :class:`DiscriminativeLoss` says.
        """
        tcam, embeddings, rows, labels = take_batch("D2NetLoss", tcam, embeddings, lengths, labels, offsets, max_length)
        if tcam.shape[-1] != self.num_classes or embeddings.shape[-1] != len(self.reference):
            raise InputError(
                f"D2NetLoss: tcam has {tcam.shape[-1]} classes and embeddings are {embeddings.shape[-1]} wide, "
                f"the loss was made for {self.num_classes} and {len(self.reference)}"
            )
        if tcam.device != self.reference.device:
            raise InputError(
                f"D2NetLoss: tcam is on {tcam.device} but the loss on {self.reference.device}; use loss.to()"
            )
        if self.recipe.um_weight != 0 and logits is None:
            raise InputError("D2NetLoss: um_weight is not 0, and its term is one of logits; pass logits=output.logits")
        if type(denoise) is not bool:
            denoise = setting(self, bool, denoise=denoise)
        recipe, settings = self.recipe, self._settings[self.training, denoise]
        if whole is not None:
            whole.check(labels)
            batch = LossInputs(tcam, embeddings, rows.lengths, labels, self.reference, offsets=rows.offsets)
            um = logits if recipe.um_weight != 0 else None
            return self._whole(
                loss_of_whole_batch(self, batch, rows, settings, whole, partners, generator, um), whole.labels, denoise
            )
        pairs = Pairs()
        if settings.separate:
            pairs = self.discriminative.pairs(tcam, rows, labels, settings, partners, generator)
        batch = LossInputs(tcam, embeddings, rows.lengths, labels, self.reference, *pairs, offsets=rows.offsets)
        video_at_once = has_video_kernel(*labels.shape)
        result = d2net_loss(batch, settings if video_at_once else settings._replace(video=False), rows.max_length)
        if self.training:
            self.reference.copy_(result.x_ref)

        # Terms that the operator does not compute are added here.
        total, snippet, video, uncertainty = result.total, result.snippet, result.video, torch.zeros_like(result.total)
        if settings.score and not settings.snippet:
            snippet = self.snippet.of(batch, result, rows.max_length)
            total = total + recipe.alpha_snippet * snippet
        if denoise and recipe.alpha_video != 0 and not (settings.video and video_at_once):
            recordings = result.pooled, result.counted, labels
            video = self.video.from_pooled(*(recordings if self.queue is None else self.queue.after(*recordings)))
            total = total + recipe.alpha_video * video
        if self.training and self.queue is not None:
            self.queue.push(result.pooled, result.counted, labels)
        if recipe.um_weight != 0 and logits is not None:
            uncertainty = self.uncertainty(
                embeddings, logits, result.counted, offsets=rows.offsets, max_length=rows.max_length
            ).total
            total = total + recipe.um_weight * uncertainty
        return D2NetLossResult(total, result.discriminative, snippet, video, uncertainty)

    def _whole(self, found: WholeLoss, labels: Tensor, denoise: bool) -> D2NetLossResult:
        """The terms of a whole batch, and their sum; in training mode updates x_ref and the queue."""
        recipe, total = self.recipe, found.discriminative
        video = uncertainty = torch.zeros_like(total)
        if self.training:
            self.reference.copy_(found.x_ref)
        if denoise and recipe.alpha_snippet != 0:
            total = total + recipe.alpha_snippet * found.snippet
        recordings = found.pooled, found.counted, labels
        if denoise and recipe.alpha_video != 0:
            video = self.video.from_pooled(*(recordings if self.queue is None else self.queue.after(*recordings)))
            total = total + recipe.alpha_video * video
        if self.training and self.queue is not None:
            self.queue.push(*recordings)
        if found.uncertainty is not None:
            uncertainty = self.uncertainty.of_recordings(found.uncertainty).total
            total = total + recipe.um_weight * uncertainty
        return D2NetLossResult(total, found.discriminative, found.snippet, video, uncertainty)

    def _settings_of(self, training: bool, denoise: bool) -> LossSettings:
        recipe, settings = self.recipe, self.discriminative.settings()
        settings["min_snippets"], settings["skip_unlabelled"] = recipe.min_snippets, recipe.skip_unlabelled
        if recipe.classification != "discriminative":  # the embeddings are needed for x_ref only
            settings.update(separate=False, embed=training)
            settings["beta"] = recipe.beta if recipe.classification == "focal" else 0.0
        if training:
            settings["update"], settings["momentum"] = True, recipe.momentum
            settings["lowest_attention"] = recipe.reference_update == "lowest_attention"
        if denoise and recipe.alpha_snippet != 0:
            settings.update(self.snippet.settings(), alpha_snippet=recipe.alpha_snippet)
        if denoise and recipe.alpha_video != 0 and isinstance(self.video, VideoDenoising) and self.queue is None:
            settings.update(self.video.settings(), video=True, alpha_video=recipe.alpha_video)
        return LossSettings(**settings)


def _denoising(recipe: LossRecipe) -> tuple[SnippetTerm, VideoTerm]:
    """The two terms of L_D that a recipe names."""
    selection: dict[str, Any] = {
        "fg_threshold": recipe.snippet_fg_threshold,
        "bg_threshold": recipe.snippet_bg_threshold,
        "own_classes": recipe.snippet_own_classes,
    }
    scores: dict[str, Any] = {
        "topk_divisor": recipe.topk_divisor,
        "probability_floor": recipe.probability_floor,
    }
    if recipe.denoising == "l1":
        return SnippetL1(**selection), VideoL1(**scores)
    if recipe.denoising == "bce":
        return SnippetBCE(**selection), VideoBCE(**scores)
    snippet_joint: dict[str, Any] = {
        **selection,
        "normalization": recipe.snippet_normalization,
        "entry_floor": recipe.snippet_entry_floor,
        "rank_tol": recipe.snippet_rank_tol,
        "oriented": recipe.snippet_oriented,
    }
    video_joint: dict[str, Any] = {
        **scores,
        "peak_share": recipe.video_peak_share,
        "normalization": recipe.video_normalization,
    }
    if recipe.denoising == "dmi":
        return SnippetDMI(**snippet_joint), VideoDMI(**video_joint)
    return SnippetDenoising(**snippet_joint), VideoDenoising(**video_joint)
