"""The loss of a batch whose recordings lie on several ranks: that of the whole batch, on each of them.

Eq. 3, 4 and 10, and x_ref, are of the recordings of a batch together. So every rank gathers p, x_fg and x_bg of all
recordings and computes the same loss from them; its gradient is that of the whole loss with respect to what its own
recordings gave. Over all ranks the gradients of a weight add up to that of one process with the whole batch.

There are two collectives: the one before Eq. 3, and where L_DS is on one more, of its term and whether it counts of
every recording, since lambda' is known only after x_ref. The backward has none.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2net.distributed import lost_ranks
from d2net.errors import InputError
from d2net.losses.pairing import Pairs, pair_by_permutation, pair_different, uniform
from d2net.losses.uncertainty import RecordingUncertainty
from d2net.ops.attention_pool import attention_pool
from d2net.ops.bottom_up_attention import bottom_up_attention
from d2net.ops.checks import as_tensor, can_look_at, check_shape
from d2net.ops.loss_ref import (
    LossInputs,
    LossSettings,
    counted_lengths,
    different_partners,
    discriminative_terms,
    lowest_snippet,
    mean_of,
    moved_x_ref,
    separation_weights,
)
from d2net.ops.packed import packed_extents
from d2net.ops.tcam_pool import tcam_pool

if TYPE_CHECKING:
    from d2net.losses._common import Rows
    from d2net.losses.total import D2NetLoss


class WholeBatch(NamedTuple):
    """What a rank knows of a batch of which it has some recordings itself.

    Attributes:
        labels: (B, C) multi-hot, of all B recordings.
        places: (B,) int64: which of those that are gathered is recording b: its rank times ``most``, plus its number on
            that rank.
        most: Recordings of a rank, at most; the same on all ranks.
    """

    labels: Tensor
    places: Tensor
    most: int

    @classmethod
    def of(cls, labels: Tensor) -> WholeBatch:
        """For a training loop of one's own: the batch of rank 0, then that of rank 1, and so on. Waits for the device.

        Args:
            labels: (b, C) multi-hot, of the recordings of this rank; b may differ from rank to rank.

        Raises:
            InputError: PyTorch has no process group.
        """
        if not dist.is_initialized():
            raise InputError("WholeBatch: there is no process group; call torch.distributed.init_process_group first")
        labels = as_tensor("WholeBatch", "labels", labels)
        check_shape("WholeBatch", "labels", labels, "b, C")
        labels = labels.to(torch.float32)
        sizes = gathered(torch.tensor(labels.shape, device=labels.device)).tolist()
        if any(classes != sizes[0][1] for _, classes in sizes):
            raise InputError(f"WholeBatch: labels of the ranks are of {[c for _, c in sizes]} classes; they must match")
        numbers = [b for b, _ in sizes]
        most = max(numbers)
        places = [rank * most + i for rank, b in enumerate(numbers) for i in range(b)]
        index = torch.tensor(places, dtype=torch.int64, device=labels.device)
        return cls(gathered(_padded(labels, most)).flatten(0, 1)[index], index, most)

    def check(self, labels: Tensor) -> None:
        """Require that this rank's part of the batch has as many recordings and classes as its ``labels`` (b, C).

        Raises:
            InputError: it has others; how many is seen on a CPU only, as a look would wait for a GPU.
        """
        b, c = labels.shape
        found = b
        if can_look_at(self.places):
            found = int((self.places // max(self.most, 1) == dist.get_rank()).sum())
        if self.labels.shape[1] != c or b > self.most or found != b:
            raise InputError(
                f"D2NetLoss: whole says that this rank has {found} recordings, at most {self.most}, of "
                f"{self.labels.shape[1]} classes; the batch has {b} of {c}: make a WholeBatch of these labels"
            )

    def gather(self, *columns: Tensor, first: Tensor | None = None) -> list[Tensor]:
        """Of each column (b, ...) of this rank's recordings the whole batch's, (B, ...), in its order.

        The gradient is this rank's own share. One collective.

        Args:
            columns: Of any dtype; what is gathered has that of the first one.
            first: Numbers of the same shape on all ranks, of which rank 0's come last in the result; None: none.
        """
        widths = [math.prod(x.shape[1:]) for x in columns]
        flat = [x.to(columns[0].dtype).reshape(len(x), width) for x, width in zip(columns, widths, strict=True)]
        rows = _padded(torch.cat(flat, 1), self.most)
        message = rows.flatten() if first is None else torch.cat((rows.flatten(), first.to(rows.dtype).flatten()))
        found = gathered(message)
        whole = found[:, : rows.numel()].reshape(-1, rows.shape[1]).index_select(0, self.places)
        result = [y.reshape(-1, *x.shape[1:]) for x, y in zip(columns, whole.split(widths, 1), strict=True)]
        return result if first is None else [*result, found[0, rows.numel() :].reshape(first.shape)]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rank = dist.get_rank()
        y = x.new_empty(dist.get_world_size(), *x.shape)
        with lost_ranks():
            dist.all_gather(list(y.unbind()), x.contiguous())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[ctx.rank]


def gathered(x: Tensor) -> Tensor:
    """(ranks, ...): ``x`` of every rank, which has the same shape on all; the gradient is that of the rank's own."""
    return _Gathered.apply(x)


def _padded(x: Tensor, most: int) -> Tensor:
    return torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:])))


class WholeLoss(NamedTuple):
    """Of a whole batch.

    Attributes:
        discriminative: L_Dis, a scalar.
        snippet: L_DS, a scalar; 0 where it is off.
        pooled: (B, C), the scores p.
        counted: (B,), above 0 where a recording counts.
        x_ref: (D,), after the update.
        uncertainty: Of UM; None where it is off.
    """

    discriminative: Tensor
    snippet: Tensor
    pooled: Tensor
    counted: Tensor
    x_ref: Tensor
    uncertainty: RecordingUncertainty | None


def loss_of_whole_batch(
    loss: D2NetLoss,
    batch: LossInputs,
    rows: Rows,
    settings: LossSettings,
    whole: WholeBatch,
    partners: Tensor | None,
    generator: torch.Generator | None,
    logits: Tensor | None,
) -> WholeLoss:
    """What :func:`d2net.ops.loss.d2net_loss` computes, but for L_DV, of a batch that lies on several ranks.

    Args:
        loss: Whose it is.
        batch: This rank's recordings.
        rows: Where they lie.
        settings: Which terms are on.
        whole: The batch.
        partners: Of the whole batch (:meth:`d2net.losses.DiscriminativeLoss.forward`); None: drawn. Rank 0's count.
        generator: Draws the partners.
        logits: For UM; None: it is off.
    """
    tcam, embeddings, _, labels, x_ref = batch[:5]
    assert embeddings is not None and x_ref is not None
    dtype = torch.promote_types(tcam.dtype, embeddings.dtype)
    tcam, x_ref = tcam.to(dtype), x_ref.to(dtype)
    if embeddings.itemsize > 2 or dtype is torch.float64:  # half precision is summed in float32
        embeddings = embeddings.to(dtype)
    batch = batch._replace(tcam=tcam, embeddings=embeddings)
    where: dict[str, Any] = {"offsets": rows.offsets, "max_length": rows.max_length}
    counted = _counted(tcam, rows, labels, settings)
    attention, pooled = tcam_pool(tcam, counted, divisor=int(settings.topk_divisor), **where)
    with torch.set_grad_enabled(torch.is_grad_enabled() and bool(settings.separate)):
        x_fg, x_bg, *has = attention_pool(
            embeddings,
            attention,
            counted,
            threshold=settings.threshold,
            background_threshold=settings.background_threshold,
            reduction="mean" if settings.mean_embeddings else "sum",
            **where,
        )
    lowest = (_at_lowest_attention(rows, attention, embeddings, counted),) if settings.lowest_attention else ()
    of_um = () if logits is None else loss.uncertainty.recordings(embeddings, logits, counted, **where)
    first = None
    if settings.separate:
        first = partners
        if partners is None:
            shape = (3 if loss.recipe.pairing == "different" else 4, len(whole.labels))
            first = uniform(shape, tcam.device, generator)
    found = whole.gather(pooled, x_fg, x_bg, *has, counted, *of_um, *lowest, first=first)
    pooled, x_fg, x_bg, has_fg, has_bg, of_all, *rest = found
    drawn = rest.pop() if first is not None else None
    background = rest.pop() if lowest else x_bg
    x, valid = torch.stack((x_fg, x_bg)), torch.stack((has_fg, has_bg)) > 0
    weights = pooled.new_zeros(3, len(pooled))
    if drawn is not None:
        pairs = _pairs(loss, valid, of_all, drawn if partners is None else drawn.to(torch.int64))
        partner = pairs.partner if pairs.keys is None else different_partners(pairs.keys, valid)
        assert partner is not None
        weights = separation_weights(x, valid, partner, pairs.source, settings.gamma)
    all_labels = whole.labels.to(pooled.dtype)
    discriminative = mean_of(discriminative_terms(pooled, all_labels, of_all, weights, settings), of_all)
    if settings.update:
        x_ref = moved_x_ref(x_ref, background.detach(), valid[1], settings.momentum)
    snippet = torch.zeros_like(discriminative)
    if settings.score:
        scores = bottom_up_attention(embeddings.detach(), x_ref, counted, **where)
        terms = loss.snippet.terms(batch, attention, scores, counted, rows.max_length)
        snippet = mean_of(*whole.gather(*terms))
    um = None
    if logits is not None:
        act, background_norm, entropy, usable, norms, snippets = rest
        um = RecordingUncertainty(act, background_norm, entropy, usable > 0, norms, snippets)
    return WholeLoss(discriminative, snippet, pooled, of_all, x_ref, um)


def _counted(tcam: Tensor, rows: Rows, labels: Tensor, settings: LossSettings) -> Tensor:
    """(b,): the lengths of this rank's recordings that count, 0 for the others."""
    if rows.offsets is None or rows.max_length is None:
        return counted_lengths(tcam, rows.lengths, labels, settings)
    lengths = packed_extents(rows.offsets, rows.lengths, rows.max_length, tcam.shape[0])[1]
    return counted_lengths(tcam.new_empty(()).expand(len(lengths), rows.max_length), lengths, labels, settings)


def _at_lowest_attention(rows: Rows, attention: Tensor, embeddings: Tensor, counted: Tensor) -> Tensor:
    """(b, D): each recording's embedding where its attention is lowest; any row where it has no snippet."""
    if rows.offsets is None or rows.max_length is None:
        first = torch.arange(len(counted), device=counted.device) * embeddings.shape[1]
        flat = embeddings.detach().flatten(0, 1)
    else:
        first, flat = rows.offsets[:-1].long(), embeddings.detach()
        attention = rows._replace(lengths=counted).padded(attention)
    if not len(flat):
        return flat.new_zeros(len(counted), flat.shape[1])
    return flat[(first + lowest_snippet(attention, counted)).clamp(max=len(flat) - 1)]


def _pairs(loss: D2NetLoss, valid: Tensor, counted: Tensor, drawn: Tensor) -> Pairs:
    """From given partners, integers, or from random numbers."""
    given, keys = (None, drawn.float()) if drawn.is_floating_point() else (drawn, None)
    if loss.recipe.pairing == "permutation":
        return pair_by_permutation(valid, counted, given, keys)
    return Pairs(keys=keys) if given is None else pair_different(len(counted), counted.device, given, None)
