"""What the CUDA functions in Python do around their kernels, without a GPU: on the meta device a tensor has no values,
so that a look at one (a wait, on a GPU) is an error, and so is a tensor of another device."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from d2net import losses, ops
from d2net.data.resident import ResidentFeatures
from d2net.losses import D2NetLoss
from d2net.model import D2Net
from d2net.ops import _library, _native
from d2net.recipes import load_recipe

# Not importable by name under --import-mode=importlib.
_spec = importlib.util.spec_from_file_location("every", Path(__file__).with_name("test_every_operator.py"))
every = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(every)

META = torch.device("meta")
WAIT = ("batched_nms_1d", "extract_proposals", "nms_1d", "soft_nms_1d")  # for how many results there are


@pytest.fixture
def launched(monkeypatch) -> Iterator[list[str]]:
    """Meta tensors take the CUDA functions; the native ones that would have run."""
    names = []

    def cuda(function: str, dtype: torch.dtype, device: torch.device, *arguments: object) -> int | None:
        if function.endswith("_bytes"):
            return 100
        members = [y for x in arguments for y in (x if isinstance(x, tuple) else (x,))]
        for tensor in members:
            assert not isinstance(tensor, Tensor) or (tensor.device == META and tensor.is_contiguous()), function
        names.append(function)

    monkeypatch.setattr(_native, "cuda", cuda)
    monkeypatch.setattr(_library, "_DEVICES", {name: frozenset({"meta"}) for name in _library._DEVICES})
    overrides = torch.library.Library("d2net", "IMPL")
    try:
        for name, function in _library.CUDA_FUNCTIONS.items():
            monkeypatch.setitem(_library.KERNELS[name], "meta", function)
            torch.library._impls.discard(f"d2net/{name}/Meta")  # as in tests/ops/simt.py
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                overrides.impl(name, function, "Meta")
        yield names
    finally:
        overrides._destroy()


@pytest.mark.parametrize("name", [name for name in every.CASES if name not in WAIT])
def test_an_operator_waits_for_nothing(name, launched):
    function, differentiable, others = every.CASES[name]
    leaves = [x.detach().to(META).requires_grad_() for x in differentiable]
    out = function(*leaves, *(x.to(META) for x in others))
    smooth = [x for x in ([out] if isinstance(out, Tensor) else out) if x.requires_grad]
    if leaves:
        torch.autograd.grad(smooth, leaves, [torch.ones_like(x) for x in smooth])
    assert launched


@pytest.mark.parametrize("recipe", ["thumos14-paper", "thumos14-release", "activitynet12-paper"])
@pytest.mark.parametrize("widths", [(32, 32), (64,)])
@pytest.mark.parametrize("apart", [False, True])
def test_a_training_step_waits_for_nothing(recipe, widths, apart, launched):
    recipe = load_recipe(recipe)
    model = D2Net.from_recipe(recipe.model, num_classes=4, stream_widths=widths).to(META)
    streams = tuple(torch.empty(101, width, device=META) for width in widths)
    labels, sizes = torch.zeros(3, 4), {"batch_size": 2, "max_snippets": 40}
    resident = ResidentFeatures(streams, [30, 20, 50], labels, layout=model, **sizes)
    loss = D2NetLoss.from_recipe(recipe.loss, num_classes=4, embedding_dim=model.embedding_dim).to(META)
    batch = resident.gather(torch.empty(model.rows(64) + 3 * 2 + 1, dtype=torch.int64, device=META))
    output = model.streams(batch.parts, batch.mask, apart=apart)
    where = {"offsets": batch.offsets, "max_length": batch.max_length}
    loss(output.tcam, output.embeddings, batch.lengths, batch.labels, **where).total.backward()
    assert {"loss", "loss_backward", "stream_layer", "class_head_backward"} <= set(launched)
    assert all(p.grad is not None for p in model.parameters())


def test_products_have_no_values_to_multiply():
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    assert ops.joint_log_condition_number(empty(2, 200, 150), empty(2, 150, 200)).shape == (2,)
    assert losses.VideoDMI()(empty(2, 5, 4), None, empty(2, 4)).is_meta
    assert losses.CoActivitySimilarity()(empty(2, 5, 4), empty(2, 5, 3), None, empty(2, 3)).is_meta
