"""The network: shapes, the paper's layers, one stream alone, and that padding never changes a valid output."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from d2net.errors import InputError
from d2net.model import D2Net, TemporalConv
from d2net.recipes import ModelRecipe, load_recipe

RECIPES = {
    "thumos14": ModelRecipe(),
    "activitynet": ModelRecipe(kernel_size=5, dilation=2),
    "residual": ModelRecipe(residual=True, dropout=0.5),
    "release": load_recipe("thumos14-release").model,
    "activitynet release": load_recipe("activitynet12-release").model,
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


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (5, 2), (1, 1)])
def test_channels_last_is_the_same_convolution(kernel_size, dilation):
    torch.manual_seed(0)
    layer = TemporalConv(6, 4, kernel_size, dilation).double()
    x, padding = torch.randn(2, 9, 6, dtype=torch.float64), torch.zeros(2, 9, 1, dtype=torch.bool)
    torch.testing.assert_close(layer.channels_last(x), layer(x, padding))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("tf32", 1e-2), ("bf16", 5e-2)])
def test_a_gpu_gives_what_a_cpu_gives(recipe, precision, tolerance, monkeypatch):
    """In float32: of float64 cuDNN takes no tensor in the layout "channels last"."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
    torch.manual_seed(0)
    model = D2Net(4, (32, 32), recipe).eval()
    features, lengths = torch.randn(3, 20, 64), torch.tensor([20, 7, 0])

    def results(device: str) -> list[torch.Tensor]:
        model.to(device).zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16" and device == "cuda"):
            out = model(features.to(device), lengths.to(device))
        (out.tcam.sum() + out.embeddings.float().square().sum()).backward()
        gradients = [p.grad / p.grad.abs().max().clamp(min=1e-6) for p in model.parameters()]
        return [x.detach().float().cpu() for x in (*out, *gradients)]

    torch.testing.assert_close(results("cuda"), results("cpu"), rtol=tolerance, atol=tolerance)


def stream(x, layers):
    """Embeddings and logits of one stream of Fig. 2."""
    x = x.transpose(1, 2)
    x = F.leaky_relu(F.conv1d(x, layers.first.weight, layers.first.bias, padding=1), 0.2)
    x = F.leaky_relu(F.conv1d(x, layers.second.weight, layers.second.bias, padding=1), 0.2)
    logits = F.conv1d(x, layers.classifier.weight, layers.classifier.bias, padding=1)
    return x.transpose(1, 2), logits.transpose(1, 2)


def test_three_convolutions_per_stream_as_in_figure_2():
    torch.manual_seed(0)
    model = D2Net(4, (5, 3), ModelRecipe(embedding_dim=7)).eval()
    features = torch.randn(2, 11, 8)
    out = model(features)

    x_a, a = stream(features[..., :5], model.stream_a)
    x_b, b = stream(features[..., 5:], model.stream_b)
    torch.testing.assert_close(out.embeddings, (x_a + x_b) / 2)
    torch.testing.assert_close(out.tcam, (a.sigmoid() + b.sigmoid()) / 2)
    torch.testing.assert_close(out.logits_a, a)


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
    assert {name.split(".")[0] for name in model.state_dict()} == {"stream_a"}
    with pytest.raises(InputError, match="features are 6 wide, the network expects 5 .one stream of 5."):
        model(torch.randn(2, 11, 6))


def test_the_names_of_weights_are_those_of_old_checkpoints():
    layers = ("classifier", "first", "second")
    expected = [f"stream_{s}.{layer}.{kind}" for s in "ab" for layer in layers for kind in ("bias", "weight")]
    assert sorted(D2Net(4, (6, 6)).state_dict()) == expected


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
