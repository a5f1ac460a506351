"""The network: shapes, the paper's layers, one stream alone, and that padding never changes a valid output."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from d2net.errors import InputError
from d2net.losses import D2NetLoss
from d2net.model import D2Net, D2NetOutput
from d2net.ops.network import network
from d2net.ops.network_ref import NetworkInputs, NetworkSettings
from d2net.recipes import ModelRecipe, load_recipe

RECIPES = {
    "thumos14": ModelRecipe(),
    "activitynet": ModelRecipe(kernel_size=5, dilation=2),
    "residual": ModelRecipe(residual=True, dropout=0.5),
    "release": load_recipe("thumos14-release").model,
    "activitynet release": load_recipe("activitynet12-release").model,
    "generic": load_recipe("generic").model,
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("widths", [(6, 6), (6,)])
def test_padding_never_changes_a_valid_output(recipe, widths):
    torch.manual_seed(0)
    model = D2Net(4, widths, recipe).double().eval()
    features = torch.randn(3, 20, sum(widths), dtype=torch.float64)
    lengths = torch.tensor([20, 7, 1])
    past = torch.arange(20) >= lengths[:, None]
    padded = model(features.masked_fill(past[:, :, None], float("nan")), lengths)
    for i, s in enumerate(lengths.tolist()):
        alone = model(features[i : i + 1, :s])
        for batched, single in zip(padded, alone, strict=True):
            if batched is None:
                assert single is None and len(widths) == 1
                continue
            torch.testing.assert_close(batched[i, :s], single[0])
            assert (batched[i, s:] == 0).all()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("gaps", [(0, 0, 0, 0), (2, 0, 1, 3)])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_recordings_one_after_another_give_what_padded_ones_give(recipe, gaps, with_lengths):
    torch.manual_seed(0)
    model = D2Net(4, (6, 6), recipe).double().eval()
    lengths = torch.tensor([7, 0, 5, 1])
    padded = torch.randn(4, 9, 12, dtype=torch.float64, requires_grad=True)
    begins = [sum(lengths[:b].tolist()) + sum(gaps[:b]) for b in range(5)]
    rows = torch.full((begins[-1] + 2, 12), float("nan"), dtype=torch.float64)
    inside = torch.zeros(len(rows), dtype=torch.bool)
    for b, length in enumerate(lengths.tolist()):
        rows[begins[b] : begins[b] + length] = padded.detach()[b, :length]
        inside[begins[b] : begins[b] + length] = True
    if any(gaps) and not with_lengths:
        pytest.skip("recordings without lengths end where the next one begins")
    offsets = torch.tensor(begins)
    rows.requires_grad_()
    of_padded, of_rows = model(padded, lengths), model(rows, lengths if with_lengths else None, offsets)
    valid = torch.arange(9) < lengths[:, None]
    for x, y in zip(of_padded, of_rows, strict=True):
        torch.testing.assert_close(x[valid], y[inside])
        assert (y[~inside] == 0).all()
    weights = [torch.randn_like(y) for y in of_rows]
    per_row = torch.autograd.grad(of_rows, [rows, *model.parameters()], weights)
    of_rows_in_padded = []
    for x, w in zip(of_padded, weights, strict=True):
        part = torch.zeros_like(x)
        part[valid] = w[inside]
        of_rows_in_padded.append(part)
    per_padded = torch.autograd.grad(of_padded, [padded, *model.parameters()], of_rows_in_padded)
    torch.testing.assert_close(per_padded[0][valid], per_row[0][inside])
    assert (per_row[0][~inside] == 0).all() and (per_padded[0][~valid] == 0).all()
    torch.testing.assert_close(per_padded[1:], per_row[1:])


def plain(model: D2Net, recipe: ModelRecipe, features: Tensor, lengths: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The network (Fig. 2) in PyTorch's own conv1d: its outputs, and what its leaky ReLUs get."""
    past = (torch.arange(features.shape[1], device=lengths.device) >= lengths[:, None])[:, None]  # (B, 1, T)
    before: list[Tensor] = []

    def convolution(x: Tensor, layer: nn.Conv1d) -> Tensor:
        reach = recipe.dilation * (layer.weight.shape[2] // 2)
        y = F.conv1d(x, layer.weight, layer.bias, padding=reach, dilation=recipe.dilation)
        return y.masked_fill(past, 0)

    def stream(x: Tensor, layers: nn.Module) -> tuple[Tensor, Tensor]:
        for layer in (layers.first, layers.second):
            before.append(convolution(x, layer))
            y = F.leaky_relu(before[-1], 0.2)
            x = x + y if recipe.residual else y
        logits = convolution(x, layers.classifier)
        return x, logits.to(torch.promote_types(logits.dtype, torch.float32))

    a, b = features.transpose(1, 2).masked_fill(past, 0).split(model.stream_widths, 1)
    (x_a, a), (x_b, b) = stream(a, model.stream_a), stream(b, model.stream_b)
    outputs = (a, b, ((a.sigmoid() + b.sigmoid()) / 2).masked_fill(past, 0), (x_a + x_b) / 2)
    return [x.transpose(1, 2) for x in outputs], before


def example(recipe: ModelRecipe) -> tuple[D2Net, Tensor, Tensor]:
    """A network, features and lengths."""
    torch.manual_seed(2)
    model = D2Net(4, (128, 128), recipe).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # a bias; those of the release recipes are 0 at first
            nn.init.normal_(parameter, std=0.3)
    features, lengths = torch.randn(3, 60, 256), torch.tensor([60, 27, 0])
    features[torch.arange(60) >= lengths[:, None]] = float("nan")
    return model, features, lengths


def results(outputs: Iterable[Tensor], model: D2Net) -> list[Tensor]:
    """Outputs of a network and the gradients of the model's parameters, in float64 on the CPU."""
    outputs = [x.to("cpu", torch.float64) for x in outputs]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(model.parameters()), weights, materialize_grads=True)
    return [x.detach().to("cpu", torch.float64) for x in (*outputs, *gradients)]


@functools.cache
def exact_results(name: str) -> list[Tensor]:
    """In float64 by :func:`plain`."""
    model, features, lengths = example(RECIPES[name])
    outputs, before = plain(model.double(), RECIPES[name], features.double(), lengths)
    # Where rounding turns the sign of one of these, a gradient jumps. In float32 no sign turns:
    assert all(x[x != 0].abs().min() > 2e-5 * x.std() for x in before)
    return results(outputs, model)


# What the relative error of outputs and gradients may be beyond twice that of plain PyTorch. In TF32 all that rounding
# to 10 bits gives (4e-4 and 1.6e-2 here, emulated), because cuDNN may compute conv1d in float32 all the same.
FLOOR = {"fp32": (1e-5, 1e-5), "tf32": (1e-3, 3e-2), "bf16": (1e-3, 1e-2)}


def assert_as_exact_as_plain_pytorch(name: str, precision: str, device: str) -> None:
    """Every output and gradient is at most twice as far from float64 as that of conv1d in the same precision.

    The distance is relative, of the whole tensor: what single numbers may differ by depends on how many there are.
    """
    model, features, lengths = (x.to(device) for x in example(RECIPES[name]))
    if precision == "bf16":  # as features are kept for it; residual sums are in their type then
        features = features.bfloat16()
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        ours, usual = model(features, lengths), plain(model, RECIPES[name], features, lengths)[0]
    names = (*D2NetOutput._fields, *(f"gradient of {name}" for name, _ in model.named_parameters()))
    worse = []
    for what, exact, x, y in zip(names, exact_results(name), results(ours, model), results(usual, model), strict=True):
        error, error_of_conv1d = (((z - exact).norm() / exact.norm()).item() for z in (x, y))
        if not error <= 2 * error_of_conv1d + FLOOR[precision][what.startswith("gradient")]:  # of NaN too
            worse.append(f"{what} {error:.1e} (conv1d {error_of_conv1d:.1e})")
    assert not worse, f"relative errors: {', '.join(worse)}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_gpu_gives_what_a_cpu_gives(name, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
    assert_as_exact_as_plain_pytorch(name, precision, "cuda")


def changed(
    weight: Callable[[Tensor], Tensor] = torch.clone, bias: Callable[[Tensor], Tensor] = torch.clone
) -> Callable:
    """The operator, with other weights than it should have."""

    def called(inputs: NetworkInputs, weights: list[Tensor], settings: NetworkSettings, *_: object) -> tuple:
        return network(inputs, [weight(x) if x.ndim == 3 else bias(x) for x in weights], settings)

    return called


BUGS = {
    "no bias": ("d2net.model.network", changed(bias=torch.zeros_like)),
    "half the bias' gradient": ("d2net.model.network", changed(bias=lambda b: (b + b.detach()) / 2)),
    "no gradient of the weights": ("d2net.model.network", changed(weight=Tensor.detach)),
    "reversed in time": (
        "d2net.model.network",
        changed(weight=lambda w: w.flip(2) if w.shape[2] > 1 else w.flip(1)),
    ),
    "padding is seen": ("d2net.ops.gaps.within", lambda x, _: torch.ones(x.shape[:2], dtype=torch.bool)),
    "another slope": ("d2net.ops.network_call.SLOPE", 0.1),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("products", [True, False])  # of matrices, or PyTorch's convolution, as for TF32
def test_as_exact_as_plain_pytorch(name, precision, products, monkeypatch):
    if not products:
        monkeypatch.setattr("d2net.ops.temporal_conv._by_windows", lambda *_: False)
    assert_as_exact_as_plain_pytorch(name, precision, "cpu")


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_worse_than_plain_pytorch(bug, monkeypatch):
    """So the test above, and that on a GPU, can fail."""
    monkeypatch.setattr(*BUGS[bug])
    for name in ("thumos14", "activitynet release"):
        with pytest.raises(AssertionError, match="relative errors"):
            assert_as_exact_as_plain_pytorch(name, "fp32", "cpu")


def test_less_precision_is_worse_than_plain_pytorch(monkeypatch):
    monkeypatch.setattr("d2net.model.network", changed(weight=lambda w: w.bfloat16().to(w)))
    with pytest.raises(AssertionError, match="relative errors"):
        assert_as_exact_as_plain_pytorch("thumos14", "fp32", "cpu")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_three_convolutions_per_stream_as_in_figure_2(recipe):
    torch.manual_seed(0)
    model = D2Net(4, (6, 6), recipe).double().eval()
    features, lengths = torch.randn(2, 11, 12, dtype=torch.float64), torch.tensor([11, 5])
    torch.testing.assert_close(list(model(features, lengths)), plain(model, recipe, features, lengths)[0])


def stream(x, layers):
    """Embeddings and logits of one stream of Fig. 2."""
    x = x.transpose(1, 2)
    x = F.leaky_relu(F.conv1d(x, layers.first.weight, layers.first.bias, padding=1), 0.2)
    x = F.leaky_relu(F.conv1d(x, layers.second.weight, layers.second.bias, padding=1), 0.2)
    logits = F.conv1d(x, layers.classifier.weight, layers.classifier.bias, padding=1)
    return x.transpose(1, 2), logits.transpose(1, 2)


def test_one_stream_alone():
    torch.manual_seed(0)
    model = D2Net(4, (5,), ModelRecipe(embedding_dim=7)).eval()
    features = torch.randn(2, 11, 5)
    out = model(features)
    x, logits = stream(features, model.stream_a)
    torch.testing.assert_close(out.embeddings, x)
    torch.testing.assert_close(out.logits_a, logits)
    torch.testing.assert_close(out.tcam, logits.sigmoid())
    assert out.logits_b is None and model.stream_b is None
    assert {name.split(".")[0] for name in model.state_dict()} == {"stream_a", "x_ref"}
    with pytest.raises(InputError, match="features are 6 wide, the network expects 5 .one stream of 5."):
        model(torch.randn(2, 11, 6))


def test_the_names_of_weights_are_those_of_old_checkpoints():
    layers = ("classifier", "first", "second")
    expected = [f"stream_{s}.{layer}.{kind}" for s in "ab" for layer in layers for kind in ("bias", "weight")]
    assert sorted(D2Net(4, (6, 6)).state_dict()) == [*expected, "x_ref"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_x_ref_is_no_weight_and_at_least_float32(dtype):
    model = D2Net(4, (5,), ModelRecipe(embedding_dim=7))
    assert torch.equal(model.x_ref, torch.zeros(7)) and not model.x_ref.requires_grad
    model.x_ref.fill_(1e5)  # which float16 does not have
    converted = model.to(dtype)
    assert converted is model and model.stream_a.first.weight.dtype == dtype
    assert model.x_ref.dtype == torch.promote_types(dtype, torch.float32) and (model.x_ref == 1e5).all()
    assert model.to("meta").x_ref.is_meta
    torch.set_default_dtype(dtype)
    try:
        assert D2Net(4, (5,)).x_ref.dtype == torch.promote_types(dtype, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_loss_updates_the_x_ref_of_a_network_that_it_is_given():
    torch.manual_seed(0)
    model = D2Net(4, (5,), ModelRecipe(embedding_dim=7))
    loss = D2NetLoss.from_recipe("thumos14-paper", num_classes=4, embedding_dim=7)
    loss.reference = model.x_ref
    out = model(torch.randn(3, 30, 5))
    loss(0.5 * out.tcam, out.embeddings, None, torch.eye(4)[:3])  # so that some of it is background
    assert model.x_ref.any() and loss.reference is model.x_ref
    model.load_state_dict(D2Net(4, (5,), ModelRecipe(embedding_dim=7)).state_dict())
    assert not loss.reference.any()  # still one


@pytest.mark.parametrize("widths", [(6, 6), (6,)])
def test_compiles(widths):
    torch._dynamo.reset()
    model = D2Net(4, widths).eval()
    features, lengths = torch.randn(2, 9, sum(widths)), torch.tensor([9, 4])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, lengths), model(features, lengths))


def test_defaults_are_two_i3d_streams():
    model = D2Net(20)
    assert model.stream_widths == (1024, 1024) and model.embedding_dim == 1024
    out = model(torch.randn(1, 3, 2048))
    assert out.tcam.shape == (1, 3, 20) and out.embeddings.shape == (1, 3, 1024)


def test_clear_errors():
    model = D2Net(4, (6, 6))
    with pytest.raises(InputError, match="12"):
        model(torch.randn(1, 5, 11))
    with pytest.raises(InputError, match="shape"):
        model(torch.randn(5, 12))
    with pytest.raises(InputError, match="odd"):
        D2Net(4, (6, 6), ModelRecipe(kernel_size=4))
    with pytest.raises(InputError, match="residual"):
        D2Net(4, (6, 5), ModelRecipe(residual=True))
    with pytest.raises(InputError, match="odd"):
        D2Net(4, (6, 6), ModelRecipe(classifier_kernel_size=2))


def test_release_variants():
    torch.manual_seed(0)
    model = D2Net(4, (64, 64), load_recipe("thumos14-release").model)
    stream = model.stream_a
    assert stream.first.kernel_size == (3,) and stream.classifier.kernel_size == (1,)
    assert stream.first.weight.std().item() == pytest.approx(0.01, rel=0.1) and (stream.first.bias == 0).all()
    features = torch.randn(2, 30, 128)
    x = model(features).embeddings
    zeros = (x == 0).float().mean().item()
    assert zeros == pytest.approx(0.7**2, abs=0.05)  # both streams dropped
    assert (model.eval()(features).embeddings != 0).all()
    plain = D2Net(4, (64, 64), ModelRecipe(residual=True, dropout=0.7))
    assert (plain(features).embeddings != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of a kernel, and of PyTorch's operators
def test_a_recording_drops_the_same_elements_without_the_others_of_its_batch(dtype):
    torch.manual_seed(0)
    model = D2Net(4, (6, 6), RECIPES["release"]).to(dtype)
    x = torch.randn(23, 12).to(dtype)
    mask = torch.ones(len(x), dtype=torch.bool)
    mask[[0, 9, 22]] = False  # recordings of 8 and 12 snippets
    x[~mask] = 0

    def run(rows: slice, numbers: Tensor | None = None) -> list[Tensor]:
        torch.manual_seed(1)
        output = model.streams(x[rows].split(6, 1), mask[rows], None, numbers)
        return [y.detach() for y in output]

    second = slice(9, 23)
    whole, alone = run(slice(None)), run(second, torch.arange(9, 23))
    torch.testing.assert_close([y[second] for y in whole], alone)
    assert torch.equal(whole[3][second] == 0, alone[3] == 0)
    assert not torch.equal(run(second)[3] == 0, alone[3] == 0)


@pytest.mark.parametrize("name", RECIPES)
def test_apart_the_first_weights_come_last_and_nothing_else_changes(name):
    torch.manual_seed(0)
    model = D2Net(4, (6, 6), RECIPES[name]).order_weights()
    n = model.rows(40)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[model.reach : 40 - model.reach] = True
    parts = [torch.randn(n, 6).masked_fill(~mask[:, None], 0) for _ in range(2)]
    order: list[str] = []
    for weight_name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=weight_name: order.append(name))

    def run(apart: bool) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        output = model.streams(parts, mask, apart=apart)
        sum(y.sin().sum() for y in output).backward()
        for p in (model.stream_a.first.weight, model.stream_b.first.weight):
            assert p.grad.stride() == p.stride()
        return [*(y.detach() for y in output), *(p.grad for p in model.parameters())]

    whole = run(False)
    order.clear()
    assert all(torch.equal(*pair) for pair in zip(run(True), whole, strict=True))
    assert sorted(order[-2:]) == ["stream_a.first.weight", "stream_b.first.weight"]


@pytest.mark.parametrize("widths", [(6, 6), (6,)])
@pytest.mark.parametrize(("b", "t"), [(0, 5), (2, 0), (0, 0)])
def test_no_recordings_or_no_snippets(widths, b, t):
    model = D2Net(3, widths)
    for lengths in (None, torch.full((b,), t)):
        output = model(torch.rand(b, t, sum(widths)), lengths)
        assert output.tcam.shape == output.logits_a.shape == (b, t, 3) and output.embeddings.shape == (b, t, 6)
        (output.tcam.sum() + output.embeddings.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_standardised_features():
    """(x - mean) * scale, as a network without it gets them; state of the network, and in float32 at least."""
    torch.manual_seed(0)
    inside, outside = (D2Net(3, (4, 2), ModelRecipe(standardize=on, embedding_dim=5)) for on in (True, False))
    missing, _ = inside.load_state_dict(outside.state_dict(), strict=False)
    assert missing == ["feature_mean", "feature_scale"]
    features, lengths = 100 + 7 * torch.randn(2, 9, 6), torch.tensor([9, 4])
    assert torch.equal(inside(features, lengths).tcam, outside(features, lengths).tcam)  # nothing is set yet
    assert inside.feature_mean is not None and inside.feature_scale is not None
    inside.feature_mean.fill_(100)
    inside.feature_scale.fill_(1 / 7)
    found, expected = inside(features, lengths), outside((features - 100) / 7, lengths)
    torch.testing.assert_close(found.tcam, expected.tcam)
    torch.testing.assert_close(found.embeddings, expected.embeddings)
    assert inside.half().feature_mean.dtype == torch.float32 and inside.double().feature_mean.dtype == torch.float64
    assert "feature_mean" not in outside.state_dict() and outside.feature_mean is None


def test_autocast_leaves_float64_alone():
    torch.manual_seed(0)
    model, features = D2Net(3, (4,)).double(), torch.randn(2, 9, 4, dtype=torch.float64)
    expected = model(features)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(features)
        half = D2Net(3, (4,))(features.float())
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True) if x is not None)
    assert half.embeddings.dtype == torch.bfloat16 and half.tcam.dtype == torch.float32


def test_the_order_of_weights_in_memory():
    """That of the products, in which they need not be copied, where it is asked for; else PyTorch's."""
    model = D2Net(3, (6, 4), ModelRecipe(embedding_dim=5))
    before = copy.deepcopy(model.state_dict())
    assert all(p.is_contiguous() for p in model.parameters())
    model.order_weights().load_state_dict(before)
    for changed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double()):
        weights = [p for p in changed.parameters() if p.ndim == 3]
        assert len(weights) == 6 and all(w.mT.is_contiguous() for w in weights)
        assert all(torch.equal(x, before[name].to(x)) for name, x in changed.state_dict().items())


def test_rows_of_no_recording_are_0_whatever_the_kernel():
    for kernel_size in (1, 3):
        model, x = D2Net(2, (4,), ModelRecipe(kernel_size=kernel_size)), torch.randn(8, 4, requires_grad=True)
        out = model(x, torch.tensor([3, 3]), torch.tensor([0, 5, 8]))
        for y in (out.tcam, out.logits_a, out.embeddings):
            assert not y[3:5].any() and y[:3].all()
        out.tcam[3:5].sum().backward()
        assert not x.grad.any()


def test_checkpointing_and_one_graph_for_all_sizes():
    torch.manual_seed(0)
    model, x = D2Net(2, (4,)), torch.randn(2, 5, 4)
    expected = torch.autograd.grad(model(x).tcam.sum(), list(model.parameters()))
    again = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).tcam.sum()
    assert all(
        torch.equal(*pair) for pair in zip(torch.autograd.grad(again, list(model.parameters())), expected, strict=True)
    )
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for t in range(20, 32):
        compiled(torch.randn(3, t, 4))
    assert graphs.frame_count <= 2


def test_no_recording_but_rows():
    model = D2Net(3, (6,))
    out = model(torch.randn(5, 6), None, torch.tensor([0]))
    assert out.tcam.shape == (5, 3) and not out.tcam.any() and out.embeddings.shape == (5, 6)
    assert D2Net(3, (6,), ModelRecipe(kernel_size=1)).bfloat16()(torch.zeros(0, 5, 6).bfloat16()).tcam.shape == (
        0,
        5,
        3,
    )


def test_a_backward_within_autocast_is_that_of_its_forward():
    torch.manual_seed(0)
    model, features = D2Net(3, (6,)), torch.randn(2, 9, 6)
    expected = torch.autograd.grad(model(features).tcam.sum(), list(model.parameters()))
    loss = model(features).tcam.sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "setting",
    [
        'torch.backends.cuda.matmul.fp32_precision = "tf32"',
        'torch.backends.fp32_precision = "tf32"',
        'torch.backends.cudnn.conv.fp32_precision = "ieee"',
    ],
)
def test_newer_settings_of_precision(setting, tmp_path):
    """After which PyTorch answers no question about the older ones. In a process of its own."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this PyTorch has only the older ones")
    code = f"import torch; {setting}; from d2net.model import D2Net; m = D2Net(3, (6,)); x = torch.ones(1, 5, 6); "
    code += "m(x).tcam.sum().backward()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)  # not where d2net/ has no built module
