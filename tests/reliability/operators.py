"""Calls every operator and loss of d2net at random, compares each with its reference, and misuses what is registered.

    python tests/reliability/operators.py --number 20000 --seed 0 --json operators.json

A call has sizes from 0 up, floats of 16, 32 or 64 bits, equal values, padding of NaN behind the lengths, lengths of 0,
views that are not contiguous, and in one call of eight NaN, Inf or huge numbers. One tensor in three lies at the end of
its page of memory, with a page behind it that must not be touched.

- Three calls in four are right: values and gradients must be those of the plain-PyTorch reference, to the precision of
  the type and four times what the reference itself differs from its own result in float64; or both refuse.
- One in eight is a public function or loss with one argument spoilt (shape, type, number, value, device). It must
  raise, or give a result: some such calls are right.
- One in eight goes to what is registered, ``torch.ops.d2net.NAME``, with one argument of a recorded call spoilt. It
  must not crash.

Calls run in children, some hundred each: one that crashes is named with its number, and the rest goes on.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import mmap
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import children
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d2net import losses, ops
from d2net.errors import D2NetError
from d2net.ops import use_backend
from d2net.ops.network import network as streams
from d2net.ops.network_ref import NetworkInputs, NetworkSettings

EPS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-5, torch.float64: 1e-9}
# Squares of these are within the type that is computed in, as docs/numbers.md asks for.
HUGE = {torch.float16: 6e4, torch.bfloat16: 1e18, torch.float32: 1e18, torch.float64: 1e150}
BATCH = 500  # calls of a child
KINDS = ("right", "misused", "registered")


@dataclass
class Call:
    """A call: ``function(*leaves, *others)``, differentiable in the leaves.

    Attributes:
        exact: Results must be the same bits.
        slack: By number of a result or gradient, what rounding may add to it: where terms of its size cancel.
    """

    name: str
    function: Callable[..., Any]
    leaves: list[Any]
    others: list[Any] = field(default_factory=list)
    exact: bool = False
    slack: dict[int, Tensor] = field(default_factory=dict)


class Numbers:
    """Random arguments, always the same for a number of a call."""

    def __init__(self, seed: object) -> None:
        self.rng = random.Random(str(seed))
        self.torch = torch.Generator().manual_seed(self.rng.randrange(2**62))
        self.strange = self.rng.random() < 0.125
        self.dtype = self.rng.choice((torch.float32,) * 3 + (torch.float64,) * 2 + (torch.float16, torch.bfloat16))
        self.ties = self.rng.random() < 0.3

    def size(self, most: int = 70) -> int:
        return min(most, self.rng.choice((0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 70)))

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.rand(shape, generator=self.torch, dtype=torch.float64)
        if self.ties:
            x = (x * 8).round() / 8
        return self.spoilt((low + (high - low) * x).to(dtype or self.dtype))

    def normal(self, *shape: int, ties: bool = True) -> Tensor:
        x = torch.randn(shape, generator=self.torch, dtype=torch.float64)
        if self.ties and ties:
            x = (x * 2).round() / 2
        return self.spoilt((x * self.rng.choice((1e-3, 1, 1, 1, 30))).to(self.dtype))

    def spoilt(self, x: Tensor) -> Tensor:
        """With a number that is none, in a strange call."""
        if self.strange and x.numel() and self.chance(0.5):
            value = self.rng.choice((math.nan, math.inf, -math.inf, 0.0, HUGE[x.dtype], torch.finfo(x.dtype).tiny))
            for _ in range(self.rng.choice((1, 1, 3))):
                x.view(-1)[self.rng.randrange(x.numel())] = value
        return x

    def lengths(self, b: int, t: int) -> Tensor | None:
        if self.chance(0.3):
            return None
        n = [self.rng.choice((0, t, self.rng.randint(0, t), self.rng.randint(0, t))) for _ in range(b)]
        return torch.tensor(n, dtype=self.rng.choice((torch.int64, torch.int64, torch.int32)))

    def padded(self, x: Tensor, lengths: Tensor | None, value: float = math.nan) -> Tensor:
        """Anything may lie behind the lengths."""
        if lengths is None or self.chance(0.5):
            return x
        past = torch.arange(x.shape[1]) >= lengths[:, None]
        return x.masked_fill(past.view(*past.shape, *[1] * (x.ndim - 2)), value)

    def labels(self, b: int, c: int) -> Tensor:
        y = torch.rand((b, c), generator=self.torch) < self.rng.choice((0.0, 0.3, 0.7, 1.0))
        return y.to(self.rng.choice((torch.float32, torch.int64, self.dtype)))

    def bools(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.torch) < self.rng.choice((0.0, 0.5, 0.8, 1.0))

    def laid(self, x: Any) -> Any:
        """The same values elsewhere in memory."""
        if not isinstance(x, Tensor):
            return x
        way = self.rng.choice(("plain", "plain", "guarded", "guarded", "strided", "turned"))
        if way == "guarded":
            return guarded(x)
        if way == "strided" and x.ndim:
            return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)[..., 1::2].copy_(x)
        if way == "turned" and x.ndim > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return x.clone()


_libc = ctypes.CDLL(None, use_errno=True)


def guarded(x: Tensor) -> Tensor:
    """A copy at the end of its memory: reading or writing behind it ends the process."""
    bytes_ = x.numel() * x.element_size()
    if bytes_ == 0:
        return x.clone()
    room = -(-bytes_ // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(begin + room), mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=room - bytes_).view(x.shape).copy_(x)


def rounding(x: Tensor) -> Tensor:
    """Of the gradient of a cosine to its vectors (..., D): the part along a vector cancels, and is 1 / its length."""
    return 8 * EPS[x.dtype] / torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True)


# -- the operators


def topk_pool(n: Numbers) -> Call:
    b, t, c = n.size(5), n.size(), n.size(33)
    lengths, divisor = n.lengths(b, t), n.rng.choice((1, 2, 8, 100))
    x = n.padded(n.normal(b, t, c), lengths)
    return Call("topk_pool", lambda x, y: ops.topk_pool(x, y, divisor=divisor), [x], [lengths])


def tcam_pool(n: Numbers) -> Call:
    b, t, c = n.size(5), n.size(), n.size(33)
    lengths, divisor = n.lengths(b, t), n.rng.choice((1, 2, 8, 100))
    x = n.padded(n.uniform(b, t, c), lengths)
    return Call("tcam_pool", lambda x, y: ops.tcam_pool(x, y, divisor=divisor), [x], [lengths])


def attention_pool(n: Numbers) -> Call:
    b, t, d = n.size(5), n.size(), n.size(40)
    lengths = n.lengths(b, t)
    # Thresholds that no activation meets exactly: which side one falls on is a matter of rounding.
    above, below, way = n.rng.choice((0.501, 0.3, 0.0)), n.rng.choice((0.501, 0.7)), n.rng.choice(("sum", "mean"))
    x, attention = n.padded(n.normal(b, t, d), lengths), n.padded(n.uniform(b, t), lengths)

    def call(x: Tensor, attention: Tensor, lengths: Tensor | None) -> Any:
        return ops.attention_pool(x, attention, lengths, threshold=above, background_threshold=below, reduction=way)

    return Call("attention_pool", call, [x, attention], [lengths])


def bottom_up_attention(n: Numbers) -> Call:
    b, t, d = n.size(5), n.size(), n.size(40)
    lengths = n.lengths(b, t)
    x, x_ref = n.padded(n.normal(b, t, d), lengths), n.normal(d)
    slack = {1: rounding(x), 2: rounding(x_ref) * b * t}
    return Call("bottom_up_attention", ops.bottom_up_attention, [x, x_ref], [lengths], slack=slack)


def tame(x: Tensor) -> Tensor:
    """Without huge numbers, beside which every other one is rounding: a singular value (also LAPACK's), a logit."""
    return torch.where(x.isfinite() & (x.abs() > 10), 1, x)


def log_condition_number(n: Numbers) -> Call:
    u = tame(n.uniform(n.size(9), n.size(12), n.size(12)))
    return Call("log_condition_number", ops.log_condition_number, [u])


def joint_log_condition_number(n: Numbers) -> Call:
    m, c, k = n.size(5), n.size(12), n.size(9)
    p, y = tame(n.uniform(m, c, k)), tame(n.uniform(m, k, c))
    return Call("joint_log_condition_number", ops.joint_log_condition_number, [p, y])


def snippet_pdmi(n: Numbers) -> Call:
    b, t = n.size(9), n.size()
    lengths, norm, floor = n.lengths(b, t), n.rng.choice(("joint", "per_class")), n.rng.choice((0.0, 0.01))
    attention, scores = n.padded(n.uniform(b, t), lengths), n.padded(n.uniform(b, t), lengths)

    def call(attention: Tensor, scores: Tensor, lengths: Tensor | None) -> Any:
        return ops.snippet_pdmi(attention, scores, lengths, normalization=norm, entry_floor=floor)

    return Call("snippet_pdmi", call, [attention], [scores, lengths])


def _segments(n: Numbers) -> tuple[Tensor, Tensor]:
    count = n.size() * n.rng.choice((1, 1, 5))
    dtype = torch.float32 if n.dtype in (torch.float16, torch.bfloat16) else n.dtype
    start, width = n.uniform(count, high=50, dtype=dtype), n.uniform(count, low=-0.5, high=10, dtype=dtype)
    return torch.stack((start, start + width), 1), n.uniform(count, dtype=dtype)


def nms_1d(n: Numbers) -> Call:
    iou = n.rng.choice((0.0, 0.3, 0.5, 1.0))
    return Call("nms_1d", lambda x, y: ops.nms_1d(x, y, iou), [], [*_segments(n)], exact=True)


def batched_nms_1d(n: Numbers) -> Call:
    iou, (x, y) = n.rng.choice((0.0, 0.3, 0.5, 1.0)), _segments(n)
    groups = torch.randint(-3, 5, (len(y),), generator=n.torch)
    return Call("batched_nms_1d", lambda x, y, z: ops.batched_nms_1d(x, y, z, iou), [], [x, y, groups], exact=True)


def soft_nms_1d(n: Numbers) -> Call:
    way, least = n.rng.choice(("linear", "gaussian")), n.rng.choice((0.0, 0.05))
    x, y = (each.double() for each in _segments(n))  # in float32 a score may lie on either side of another

    def call(x: Tensor, y: Tensor) -> Any:
        return ops.soft_nms_1d(x, y, iou_threshold=0.31, sigma=0.5, min_score=least, method=way)

    return Call("soft_nms_1d", call, [], [x, y])


def iou_1d(n: Numbers) -> Call:
    return Call("iou_1d", ops.iou_1d, [_segments(n)[0], _segments(n)[0]])


def extract_proposals(n: Numbers) -> Call:
    b, t, c = n.size(4), n.size(), n.size(9)
    lengths = n.lengths(b, t)
    x = n.padded(n.uniform(b, t, c), lengths)
    levels = [0.2, 0.45, 0.7][: n.rng.randint(1, 3)]
    outer, iou = n.rng.choice(("pooled", "mean_of_sides")), n.rng.choice((0.35, 0.5, 1.0))
    least, inflation = n.rng.choice((1, 1, 3)), n.rng.choice((0.0, 0.25, 2.0))

    def call(x: Tensor, classes: Tensor, lengths: Tensor | None) -> Any:
        options = {"min_length": least, "inflation": inflation, "outer": outer, "nms_iou": iou}
        return ops.extract_proposals(x, classes, lengths, thresholds=levels, **options)

    return Call("extract_proposals", call, [], [x, n.bools(b, c), lengths])


def network(n: Numbers) -> Call:
    """Biases decide on the sign of what a leaky ReLU gets, not rounding: products with the weights are below 1."""
    two, residual, dilation = n.chance(0.7), n.chance(0.4), n.rng.choice((1, 1, 2))
    k, taps = n.rng.choice((1, 3, 3, 5)), n.rng.choice((1, 3, 5))
    d, c = max(1, n.size(33)), max(1, n.size(20))
    width, reach = d if residual else max(1, n.size(17)), max(k, taps) // 2 * dilation
    runs = [False] * reach
    for _ in range(n.size(5)):
        runs += [True] * n.size(40) + [False] * reach
    mask = torch.tensor(runs + [False] * (n.size(3) + (-(len(runs) + 1) % k)), dtype=torch.bool)
    if len(mask) == 0:
        mask = torch.zeros(1, dtype=torch.bool)
    leaves = [n.uniform(len(mask), width, low=-1).masked_fill(~mask[:, None], 0) for _ in range(1 + two)]
    for _ in range(1 + two):
        # A residual layer adds its input, of at most 1, to its output, of at most 3.
        for out, of, size, most in ((d, width, k, 1), (d, d, k, 3 + residual), (c, d, taps, 12)):
            leaves.append(n.uniform(out, of, size, low=-1 / (most * of * size), high=1 / (most * of * size)))
            signs = torch.randint(2, (out,), generator=n.torch) * 2 - 1
            leaves.append(n.uniform(out, low=1.25, high=2).clamp(min=1.25) * signs.to(n.dtype))
    settings = NetworkSettings(dilation, residual, n.rng.choice((0.0, 0.3, 0.7)), n.chance(0.5))
    seed = torch.randint(2**62, (1,), generator=n.torch)
    numbers, apart = torch.randint(2**62, (len(mask),), generator=n.torch) if n.chance(0.5) else None, n.chance(0.5)

    def call(*given: Any) -> Any:
        *inputs, mask, seed, numbers = given
        inputs = inputs if two else [inputs[0], None, *inputs[1:]]
        found = streams(NetworkInputs(mask, *inputs[:2], seed, numbers), inputs[2:], settings, apart=apart)
        return [x for x in found if x is not None]

    return Call("network", call, [tame(x) for x in leaves], [mask, seed, numbers])


# -- the losses, whose whole computation runs once with the operators and once with their references


def _activations(n: Numbers) -> tuple[list[Tensor], list[Any], tuple[int, ...]]:
    """TCAM and embeddings; lengths and labels; B, T, C, D. No activation lies at a threshold of the losses."""
    b, t, c, d = n.size(9), n.size(), max(1, n.size(20)), n.size(40)
    lengths = n.lengths(b, t)
    tcam = n.padded((n.uniform(b, t, c).double() * 0.98 + 0.003).to(n.dtype), lengths)
    return [tcam, n.padded(n.normal(b, t, d), lengths)], [lengths, n.labels(b, c)], (b, t, c, d)


def _classification(name: str, make: Callable[[], torch.nn.Module]) -> Callable[[Numbers], Call]:
    def draw(n: Numbers) -> Call:
        (tcam, _), (lengths, labels), _ = _activations(n)
        return Call(name, lambda x, n, y: make()(x, n, y), [tcam], [lengths, labels])

    return draw


def _snippet(name: str, make: Callable[[], torch.nn.Module]) -> Callable[[Numbers], Call]:
    def draw(n: Numbers) -> Call:
        (tcam, x), (lengths, labels), (_, _, _, d) = _activations(n)
        call = lambda tcam, x, n, ref, y: make()(tcam, x, n, ref, y)  # noqa: E731
        return Call(name, call, [tcam], [x, lengths, n.normal(d, ties=False), labels])

    return draw


def discriminative_loss(n: Numbers) -> Call:
    leaves, others, _ = _activations(n)
    options = {
        "pairing": n.rng.choice(("different", "permutation")),
        "embedding_pooling": n.rng.choice(("sum", "mean")),
        "class_reduction": n.rng.choice(("sum", "mean")),
        "balance_classes": n.chance(0.3),
    }

    def call(tcam: Tensor, x: Tensor, lengths: Tensor | None, labels: Tensor) -> Any:
        found = losses.DiscriminativeLoss(**options)(
            tcam, x, lengths, labels, generator=torch.Generator().manual_seed(1)
        )
        return found[0], *found[1]

    return Call("DiscriminativeLoss", call, leaves, others)


def d2net_loss(n: Numbers) -> Call:
    leaves, others, (_, _, c, d) = _activations(n)
    recipe = n.rng.choice(("thumos14-paper", "thumos14-release", "activitynet12-paper", "activitynet12-release"))

    def call(tcam: Tensor, x: Tensor, lengths: Tensor | None, labels: Tensor) -> Any:
        loss = losses.D2NetLoss.from_recipe(recipe, num_classes=c, embedding_dim=d)
        if tcam.dtype == torch.float64:
            loss = loss.double()
        return *loss(tcam, x, lengths, labels, generator=torch.Generator().manual_seed(1)), loss.reference

    return Call(f"D2NetLoss {recipe}", call, leaves, others)


def uncertainty_modeling(n: Numbers) -> Call:
    _, (lengths, _), (b, t, c, d) = _activations(n)
    x = n.padded(n.normal(b, t, d, ties=False), lengths)  # equal norms would be ordered by rounding
    logits = n.padded(n.normal(b, t, c), lengths)
    return Call("UncertaintyModeling", lambda x, y, n: losses.UncertaintyModeling()(x, y, n), [x, logits], [lengths])


def co_activity_similarity(n: Numbers) -> Call:
    (_, x), (lengths, labels), (b, t, c, _) = _activations(n)
    logits = n.padded(n.normal(b, t, c), lengths)
    call = lambda x, y, n, z: losses.CoActivitySimilarity()(x, y, n, z)  # noqa: E731
    return Call("CoActivitySimilarity", call, [x, logits], [lengths, labels])


def snippet_contrast(n: Numbers) -> Call:
    (_, x), (lengths, _), (b, t, _, _) = _activations(n)
    call = lambda x, a, n: losses.SnippetContrast()(x, a, n)  # noqa: E731
    return Call("SnippetContrast", call, [x], [n.padded(n.uniform(b, t), lengths), lengths])


def denoising_loss(n: Numbers) -> Call:
    (tcam, x), (lengths, labels), (_, _, _, d) = _activations(n)
    call = lambda tcam, x, n, y, ref: losses.DenoisingLoss()(tcam, x, n, y, ref)  # noqa: E731
    return Call("DenoisingLoss", call, [tcam], [x, lengths, labels, n.normal(d, ties=False)])


def draw_permutations(n: Numbers) -> Call:
    size = n.size()
    counts = torch.tensor([n.rng.randint(0, size) for _ in range(n.size(5))], dtype=torch.int64)
    call = lambda x: losses.draw_permutations(x, size, torch.Generator().manual_seed(1))  # noqa: E731
    return Call("draw_permutations", call, [], [counts], exact=True)


DRAWN: list[Callable[[Numbers], Call]] = [
    *(topk_pool, tcam_pool, network, attention_pool, bottom_up_attention, log_condition_number),
    *(joint_log_condition_number, snippet_pdmi, nms_1d, batched_nms_1d, soft_nms_1d, iou_1d, extract_proposals),
    *(discriminative_loss, d2net_loss, uncertainty_modeling, co_activity_similarity, snippet_contrast),
    *(denoising_loss, draw_permutations),
    *(
        _classification(name, getattr(losses, name))
        for name in ("FocalLoss", "CrossEntropyLoss", "VideoDenoising", "VideoDMI", "VideoL1", "VideoBCE")
    ),
    *(_snippet(name, getattr(losses, name)) for name in ("SnippetDenoising", "SnippetDMI", "SnippetL1", "SnippetBCE")),
]


# -- running one


def results(call: Call, leaves: list[Any], others: list[Any]) -> list[Tensor]:
    """Results; and where they are finite, gradients of their sum weighted at random."""
    inputs = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    out = call.function(*inputs, *others)
    out = [out] if isinstance(out, Tensor) else list(out)
    smooth = [x for x in out if x.requires_grad]
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    grads: tuple = ()
    if smooth and wanted and all(x.isfinite().all() for x in out if x.is_floating_point()):
        seeds = [torch.Generator().manual_seed(i + 7) for i in range(len(smooth))]
        weigh = [(0.5 + torch.rand(x.shape, generator=g)).to(x.dtype) for x, g in zip(smooth, seeds, strict=True)]
        grads = torch.autograd.grad(smooth, wanted, weigh, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*out, *grads)]


def outcome(call: Call, leaves: list[Any], others: list[Any]) -> list[Tensor] | str:
    """Results, or what was refused."""
    try:
        return results(call, leaves, others)
    except D2NetError as error:
        return f"refused: {error}"


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def differs(found: list[Tensor], expected: list[Tensor], true: Any, call: Call, dtype: torch.dtype) -> str:
    """In what; empty where in nothing."""
    if len(found) != len(expected):
        return f"{len(found)} results, expected {len(expected)}"
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i} is {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}"
        if not a.is_floating_point() or call.exact:
            if not torch.equal(a, b):
                return f"result {i} differs at {(a != b).nonzero()[:3].tolist()}"
            continue
        t = true[i] if not isinstance(true, str) and len(true) == len(found) and true[i].shape == b.shape else wide(b)
        a, b, t = wide(a), wide(b), wide(t)
        finite = torch.isfinite(b) & torch.isfinite(t)
        if not bool((torch.isnan(a) == torch.isnan(b))[torch.isnan(t) | finite].all()):
            at = (torch.isnan(a) != torch.isnan(b)).nonzero()[:3].tolist()
            return f"result {i}: NaN in one alone, at {at}: {a[tuple(at[0])]} and {b[tuple(at[0])]}"
        scale = b[finite].abs().max() if finite.any() else b.new_zeros(())
        if ((b - t).abs() > 0.05 * scale)[finite].any():
            raise Undecided
        allowed = EPS[dtype] * (b.abs() + scale) + 4 * (b - t).abs() + EPS[dtype] * 1e-3 + call.slack.get(i, 0)
        wrong = finite & ((a - b).abs() > allowed)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            numbers = [f"{x[at].item():.9g}" for x in (a, b, t)]
            return f"result {i} at {list(at)}: {numbers[0]}, the reference {numbers[1]}, in float64 {numbers[2]}"
    return ""


def check_right(call: Call, n: Numbers) -> str:
    place = [[n.laid(x) for x in group] for group in (call.leaves, call.others)]
    found = outcome(call, *place)
    with use_backend("reference"):
        expected = outcome(call, call.leaves, call.others)
        true = outcome(call, [wide(x) for x in call.leaves], [wide(x) for x in call.others])
    if isinstance(found, str) or isinstance(expected, str):
        if isinstance(found, str) and isinstance(expected, str):
            return ""
        return f"one alone refuses: {found if isinstance(found, str) else expected}"
    return differs(found, expected, true, call, n.dtype)


def spoil(x: Any, n: Numbers) -> Any:
    """Something else in place of an argument."""
    rng = n.rng
    if isinstance(x, Tensor):
        ways: list[Callable[[], Any]] = [
            lambda: x[..., :-1] if x.ndim and x.shape[-1] else x.new_zeros(3),
            lambda: x[:-1] if x.ndim and x.shape[0] else x.new_zeros(3),
            lambda: x[..., None],
            lambda: x.flatten(),
            lambda: x.new_zeros(()),
            lambda: x.new_zeros((0,) * x.ndim),
            lambda: x.to(rng.choice((torch.float32, torch.float64, torch.float16, torch.bfloat16))),
            lambda: x.to(rng.choice((torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64))),
            lambda: x.to("meta"),
            lambda: x.to_sparse() if x.layout == torch.strided and x.numel() else x,
            lambda: x[:1].expand(x.shape) if x.ndim and x.shape[0] else x,
            lambda: (
                torch.full_like(x, rng.choice((-1, 2**30, 2**62)))
                if x.dtype == torch.int64
                else -1e30 * torch.ones_like(x)
            ),
            lambda: None,
            lambda: "text",
            lambda: x.tolist(),
        ]
        return guard_any(rng.choice(ways)())
    if isinstance(x, bool):
        return not x
    if isinstance(x, (int, float)):
        return rng.choice((0, -1, 1, 2**31, 2**62, -(2**62), math.nan, math.inf, -math.inf, 1e308, None))
    if isinstance(x, list):
        at = rng.randrange(len(x)) if x else 0
        one_of_it = [*x[:at], *(spoil(y, n) for y in x[at : at + 1]), *x[at + 1 :]]
        return rng.choice(([], x + x, [math.nan] * max(1, len(x)), None, one_of_it, one_of_it))
    return rng.choice((torch.zeros(3), torch.zeros(0), 1))


def guard_any(x: Any) -> Any:
    if isinstance(x, Tensor) and x.device.type == "cpu" and x.layout == torch.strided:
        return guarded(x.contiguous())
    return x


def check_misused(call: Call, n: Numbers) -> str:
    """Anything may come of it but a crash, and an error that is a D2NetError or Python's own of a wrong type."""
    group = n.rng.choice([g for g in (call.leaves, call.others) if g])
    i = n.rng.randrange(len(group))
    group[i] = spoil(group[i], n)
    tell(call.name, [*call.leaves, *call.others])
    try:
        results(call, [guard_any(x) for x in call.leaves], [guard_any(x) for x in call.others])
    except D2NetError:
        return ""
    except (TypeError, NotImplementedError, RuntimeError, IndexError, AttributeError, ValueError) as error:
        # Of PyTorch or Python, not of d2net: a refusal, though not one that names the way out.
        raise OtherError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None
    raise Accepted


class OtherError(Exception):
    """A call was refused, in other words than d2net's."""


class Undecided(Exception):
    """The reference itself is far from its own result in float64: rounding decides, as on which side of a rank."""


class Accepted(Exception):
    """A spoilt call gave a result."""


class _Recorder(TorchDispatchMode):
    """The calls of registered operators, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, function, types, arguments=(), names=None):
        if function.namespace == "d2net":
            self.calls.append((function, arguments))
        return function(*arguments, **(names or {}))


def check_registered(call: Call, n: Numbers) -> str:
    with _Recorder() as recorder:
        outcome(call, call.leaves, call.others)
    if not recorder.calls:
        raise Accepted
    function, arguments = n.rng.choice(recorder.calls)
    values = [guard_any(x.detach()) if isinstance(x, Tensor) else x for x in arguments]
    for i in n.rng.sample(range(len(values)), min(len(values), n.rng.choice((1, 1, 2)))):
        values[i] = spoil(values[i], n)
    tell(function, values)
    try:
        found = function(*values)
    except Exception:
        return ""
    for x in found if isinstance(found, (tuple, list)) else [found]:
        if isinstance(x, Tensor) and x.device.type == "cpu":
            x.clone()  # all of it is there to be read
    raise Accepted


_telling = False


def tell(function: object, arguments: list[Any]) -> None:
    """The call that comes now, where someone wants to know: it may be the process's last."""
    if _telling:
        shown = [f"{tuple(x.shape)} {x.dtype} {x.device}" if isinstance(x, Tensor) else str(x)[:40] for x in arguments]
        print(f"{function}({', '.join(shown)})", flush=True)


def kind_of(number: int) -> str:
    return "misused" if number % 8 == 6 else "registered" if number % 8 == 7 else "right"


def one(seed: int, number: int) -> tuple[str, str, str]:
    """Kind and name of the call, and what came of it: "", "refused otherwise", "accepted", or what is wrong."""
    n = Numbers(f"{seed} {number}")
    kind = kind_of(number)
    call = DRAWN[(number // 8 * 7 + number) % len(DRAWN)](n)
    try:
        return (
            kind,
            call.name,
            {"right": check_right, "misused": check_misused, "registered": check_registered}[kind](call, n),
        )
    except OtherError as error:
        return kind, call.name, f"other error: {error}"
    except (Accepted, Undecided) as found:
        return kind, call.name, type(found).__name__.lower()
    except Exception as error:
        return kind, call.name, f"raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def show(seed: int, number: int) -> None:
    global _telling
    _telling = True
    print(*one(seed, number))


def some(seed: int, numbers: range, place: int) -> None:
    """The calls of one child: which it is at goes to the file ``place``, what came of each to a line of stdout."""
    for number in numbers:
        os.pwrite(place, number.to_bytes(8, "little"), 0)
        kind, name, found = one(seed, number)
        known = ("accepted", "undecided", "other error")
        verdict = next((v for v in known if found.startswith(v)), "failed" if found else "good")
        strange = " on strange numbers" if verdict == "failed" and Numbers(f"{seed} {number}").strange else ""
        text = found[:400] if verdict in ("failed", "other error") else ""
        print(json.dumps([number, kind, verdict, f"{name}{strange}", text]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--call", type=int, help="only this one, here and not in a child")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    if given.call is not None:
        show(given.seed, given.call)
        return 0
    for i in range(min(given.number, 300)):  # PyTorch takes long over its first calls: here, once, not in every child
        if kind_of(i) == "right":
            one(-1, i)
    counts: Counter = Counter()
    problems: list[str] = []
    others: Counter = Counter()
    with tempfile.TemporaryFile() as place:
        first = 0
        while first < given.number:
            last = min(first + BATCH, given.number)
            ended = children.run(
                lambda first=first, last=last: some(given.seed, range(first, last), place.fileno()), limit=300
            )
            for line in ended.stdout.splitlines():
                if not line.startswith("["):
                    continue
                number, kind, verdict, name, found = json.loads(line)
                counts[f"{kind}: {verdict}"] += 1
                if verdict == "failed":
                    problems.append(f"call {number}, {kind}, {name}: {found}")
                elif verdict == "other error":
                    others[f"{name}: {found[:100]}"] += 1
            if ended.code == 0:
                first = last
                continue
            at = int.from_bytes(os.pread(place.fileno(), 8, 0), "little")
            what = "hangs" if ended.late else f"ends the process with {ended.code}"
            alone = children.run(lambda at=at: show(given.seed, at), limit=60)
            problems.append(f"call {at}, {kind_of(at)}: {what}: {alone.stdout.strip()[-300:]}")
            counts[f"{kind_of(at)}: {'hung' if ended.late else 'crashed'}"] += 1
            first = at + 1
    for problem in problems[:100]:
        print(f"  {problem}")
    if given.json:
        figures = {
            **children.environment(),
            "seed": given.seed,
            "calls": dict(sorted(counts.items())),
            "problems": problems,
        }
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    for text, count in others.most_common(25):
        print(f"  (refused in other words, {count} times: {text})")
    failed = len(problems)
    print(f"{counts.total()} calls: {dict(sorted(counts.items()))}; {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
