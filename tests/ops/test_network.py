"""The streams of the network on every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import network as operator
from d2net.ops import use_backend
from d2net.ops.network import network
from d2net.ops.network_call import NetworkCopies
from d2net.ops.network_ref import NetworkInputs, NetworkSettings, StreamWeights, dropout_ref, network_ref
from d2net.ops.temporal_conv import reach_of, reversed_taps

LENGTHS = (7, 0, 18, 1)
VARIANTS = {
    "THUMOS14": ((3, 3), NetworkSettings()),
    "ActivityNet": ((5, 5), NetworkSettings(dilation=2)),
    "release": ((3, 1), NetworkSettings(residual=True, dropout=0.7, dropout_embeddings=True)),
    "ActivityNet release": ((5, 5), NetworkSettings(2, residual=True, dropout=0.7, dropout_embeddings=True)),
    "dropout alone": ((3, 3), NetworkSettings(dropout=0.5)),
    "residual, a wider classifier": ((1, 5), NetworkSettings(residual=True, dropout=0.3)),
}


class Case(NamedTuple):
    inputs: NetworkInputs
    weights: list[Tensor]
    settings: NetworkSettings

    def leaves(self) -> list[Tensor]:
        return [x for x in self.inputs[1:3] if x is not None] + self.weights


def case(
    name: str, streams: int = 2, dtype: torch.dtype = torch.float64, d: int = 19, rows_by: int = 0, device="cpu"
) -> Case:
    """``rows_by``: how many rows more than a number of which convolutions are products of matrices."""
    (k, of_classifier), settings = VARIANTS[name]
    reach = reach_of((k, of_classifier), settings.dilation)
    begins, n = [], reach
    for length in LENGTHS:
        begins.append(n)
        n += length + reach
    n += -(n + 1) % k + rows_by
    mask = torch.zeros(n, dtype=torch.bool)
    for begin, length in zip(begins, LENGTHS, strict=True):
        mask[begin : begin + length] = True
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    width = d if settings.residual else 6
    features, weights = [], []
    for _ in range(streams):
        features.append(torch.where(mask[:, None], drawn(n, width), 0))
        for out, of, taps in ((d, width, k), (d, d, k), (5, d, of_classifier)):
            weights += [drawn(out, of, taps, scale=0.3), drawn(out, scale=0.2)]
    features, weights = ([x.to(device, dtype).requires_grad_() for x in y] for y in (features, weights))
    seed = torch.tensor([2**61 + 5], device=device) if settings.dropout else None
    inputs = NetworkInputs(mask.to(device), features[0], features[1] if streams == 2 else None, seed)
    return Case(inputs, weights, settings)


def kernels(inputs: NetworkInputs, weights: list[Tensor], settings: NetworkSettings) -> tuple[Tensor, ...]:
    """The kernels, whatever the type."""
    return operator._network(*inputs, None, None, *weights, *[None] * (12 - len(weights)), [], *settings)[:4]


def run(x: Case, call: Callable[..., tuple] = network) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, in float64 on the CPU."""
    outputs = [y for y in call(*x) if y is not None]
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, x.leaves(), weights)
    return [[y.detach().cpu().double() for y in z] for z in (outputs, gradients)]


def exact(x: Case) -> tuple[list[Tensor], list[Tensor]]:
    with use_backend("reference"):
        return run(x)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(("d", "rows_by"), [(19, 0), (16, 0), (7, 1), (64, 2)])
def test_same_as_the_reference_in_float64(device, name, streams, d, rows_by):
    found = run(case(name, streams, d=d, rows_by=rows_by, device=device))
    for ours, expected in zip(found, exact(case(name, streams, d=d, rows_by=rows_by)), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_the_type(device, name, dtype, monkeypatch, request):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    d = 24
    x = case(name, dtype=dtype, d=d, device=device)
    # What rounding of the inputs does is no error of ours.
    same = case(name, d=d)
    with torch.no_grad():
        for leaf, rounded in zip(same.leaves(), x.leaves(), strict=True):
            leaf.copy_(rounded.double())
    bound = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}[dtype]
    call = kernels if "simt" in request.node.name else network  # which takes PyTorch for half precision on a CPU
    for ours, expected in zip(run(x, call), exact(same), strict=True):
        for y, z in zip(ours, expected, strict=True):
            assert (y - z).norm() <= bound * z.norm()


@pytest.mark.parametrize("share", [0.0, 1e-7, 0.3, 0.5, 0.7, 0.999999])
def test_dropout_of_every_backend_keeps_the_same_elements(device, share):
    x = case("dropout alone", d=200, device=device)
    x = x._replace(settings=NetworkSettings(dropout=share, dropout_embeddings=True))
    *_, embeddings = network(*x)
    *_, without = network(*x._replace(settings=NetworkSettings()))
    n, d = embeddings.shape
    kept_a, scale = dropout_ref(torch.tensor([2**61 + 5]), n, d, share)
    kept_b, _ = dropout_ref(torch.tensor([2**61 + 6]), n, d, share)
    mask = x.inputs.mask.cpu()[:, None]
    assert torch.equal((embeddings != 0).cpu() & mask, (kept_a | kept_b) & mask)
    kept = (kept_a[mask[:, 0]].double().mean() + kept_b[mask[:, 0]].double().mean()) / 2
    assert abs(kept - (1 - share)) <= 4 * (share * (1 - share) / (2 * d * sum(LENGTHS))) ** 0.5 + 1 / 65536
    assert scale == 65536 / (65536 - min(round(share * 65536), 65535))
    if share == 0:
        assert torch.equal(embeddings, without)


def test_dropout_keeps_the_mean():
    """The factor is that of the share that is dropped, which is a multiple of 1 / 65536."""
    kept, scale = dropout_ref(torch.tensor([3]), 1000, 1024, 0.7)
    assert (kept.double() * scale).mean().item() == pytest.approx(1, abs=5 * (0.7 / 0.3 / kept.numel()) ** 0.5)
    columns = kept.double().mean(0)
    assert (columns - 0.3).abs().max() < 6 * (0.21 / 1000) ** 0.5
    other, _ = dropout_ref(torch.tensor([4]), 1000, 1024, 0.7)
    assert (kept == other).double().mean().item() == pytest.approx(0.58, abs=0.005)


PARTS = ((2, 0), (3,), (), (1,))  # recordings of the batch, in another order, on four processes; one has none


def places_of(x: Case, recordings: Sequence[int]) -> tuple[list[slice], int]:
    """The rows of recordings that are packed one after another, and how many there are in all."""
    k, of_classifier = x.weights[0].shape[2], x.weights[4].shape[2]
    reach = reach_of((k, of_classifier), x.settings.dilation)
    places, n = [], reach
    for b in recordings:
        places.append(slice(n, n + LENGTHS[b]))
        n += LENGTHS[b] + reach
    return places, n + -(n + 1) % k


def part_of(x: Case, recordings: Sequence[int]) -> NetworkInputs:
    """Some recordings of a batch, packed anew with the numbers of their rows in it."""
    (whole, _), (places, n) = places_of(x, range(len(LENGTHS))), places_of(x, recordings)
    mask = x.inputs.mask.new_zeros(n)
    numbers = torch.full((n,), -3, device=mask.device)  # what gaps have must not matter
    features = [y.new_zeros(n, y.shape[1]) for y in x.inputs[1:3]]
    for b, place in zip(recordings, places, strict=True):
        mask[place], numbers[place] = True, torch.arange(whole[b].start, whole[b].stop, device=mask.device)
        for to, of in zip(features, x.inputs[1:3], strict=True):
            to[place] = of.detach()[whole[b]]
    return NetworkInputs(mask, *(y.requires_grad_() for y in features), x.inputs.seed, numbers)


@pytest.mark.parametrize("name", [name for name, (_, settings) in VARIANTS.items() if settings.dropout])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recordings_drop_the_same_elements_whatever_rows_they_have(request, device, name, dtype):
    """A batch on several processes, each with some recordings, is the batch on one."""
    if dtype == torch.float32:  # in two threads PyTorch's products round otherwise, which has nothing to do with rows
        request.getfixturevalue("one_thread")
    x = case(name, dtype=dtype, d=24, device=device)
    whole, _ = places_of(x, range(len(LENGTHS)))
    outputs = network(*x)
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    expected = torch.autograd.grad(outputs, x.leaves(), grads)
    totals = [torch.zeros_like(y) for y in x.leaves()]
    for recordings in PARTS:
        places, _ = places_of(x, recordings)
        inputs = part_of(x, recordings)
        found = network(inputs, x.weights, x.settings)
        grads_here = [torch.zeros_like(y) for y in found]
        for b, place in zip(recordings, places, strict=True):
            for y, z, grad, grad_here in zip(found, outputs, grads, grads_here, strict=True):
                torch.testing.assert_close(y[place], z[whole[b]])
                grad_here[place] = grad[whole[b]]
            if x.settings.dropout_embeddings:  # they are 0 where both streams drop
                assert torch.equal(found[3][place] == 0, outputs[3][whole[b]] == 0)
        gradients = torch.autograd.grad(found, [*inputs[1:3], *x.weights], grads_here)
        for b, place in zip(recordings, places, strict=True):
            for total, gradient in zip(totals[:2], gradients[:2], strict=True):
                total[whole[b]] = gradient[place]
        for total, gradient in zip(totals[2:], gradients[2:], strict=True):
            total += gradient
    torch.testing.assert_close(totals, [*expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_rows_in_order_are_none(device, dtype):
    """To the bit; and without dropout none matter."""
    for name in ("release", "dropout alone", "THUMOS14"):
        x = case(name, dtype=dtype, device=device)
        n = len(x.inputs.mask)
        for numbers in (torch.arange(n), torch.arange(n).repeat_interleave(2)[::2]):  # contiguous, and not
            numbered = x._replace(inputs=x.inputs._replace(numbers=numbers.to(device)))
            for ours, expected in zip(run(numbered), run(x), strict=True):
                assert all(torch.equal(y, z) for y, z in zip(ours, expected, strict=True))
    without = x._replace(inputs=x.inputs._replace(numbers=torch.full((n,), 7, device=device)))
    assert all(torch.equal(y, z) for y, z in zip(run(without)[0], run(x)[0], strict=True))


def test_a_number_may_be_any(device):
    x = case("dropout alone", d=40, device=device)
    x = x._replace(settings=x.settings._replace(dropout_embeddings=True))
    numbers = 2**63 - 1 - 3**30 * torch.arange(len(x.inputs.mask))
    *_, embeddings = network(x.inputs._replace(numbers=numbers.to(device)), x.weights, x.settings)
    kept = [dropout_ref(torch.tensor([2**61 + 5 + s]), *embeddings.shape, 0.5, numbers)[0] for s in range(2)]
    mask = x.inputs.mask.cpu()[:, None]
    assert torch.equal((embeddings != 0).cpu(), (kept[0] | kept[1]) & mask)
    assert not torch.equal(kept[0], dropout_ref(torch.tensor([2**61 + 5]), *embeddings.shape, 0.5)[0])


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """-0 is not 0."""
    return all(
        torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(("dtype", "rows_by"), [(torch.float32, 0), (torch.float64, 1)])
def test_apart_gives_the_same_bits(device, name, streams, dtype, rows_by):
    """It makes the same calls on the same numbers."""
    x = case(name, streams, dtype=dtype, rows_by=rows_by, device=device)
    for wanted in (True, False):  # of features, the sum of both nodes' where there are residuals
        for leaf in x.leaves()[:streams]:
            leaf.requires_grad_(wanted)
        for copies in (None, copies_of(x)):
            found, expected = (apart_or_not(x, apart, copies) for apart in (True, False))
            if device.type == "cuda":  # PyTorch may choose other products for other memory
                torch.testing.assert_close(found, expected)
            else:
                assert equal(found, expected)


def apart_or_not(x: Case, apart: bool, copies: NetworkCopies | None) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = [y for y in network(*x, copies, apart) if y is not None]
    leaves = [y for y in x.leaves() if y.requires_grad]
    return [y.detach() for y in (*outputs, *torch.autograd.grad(outputs, leaves, [y.cos() for y in outputs]))]


@pytest.mark.parametrize("name", ["THUMOS14", "ActivityNet release"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_apart_in_half_precision_gives_the_same_bits(simt_kernels, name, dtype):
    """As a training on a GPU does: features and copies of the weights in half precision, weights in float32."""
    x, half = case(name, dtype=torch.float32, d=24), case(name, dtype=dtype, d=24).inputs
    copies = NetworkCopies.blank([StreamWeights(*x.weights[s : s + 6]) for s in (0, 6)], dtype)
    for to, of in zip(copies.flat(), copies_of(x).flat(), strict=True):
        to.copy_(of)
    found = []
    for apart in (True, False):
        products = [None, None]
        if apart:
            of = zip(half[1:3], x.weights[::6], copies.first, strict=True)
            products = [operator.first_layer(half.mask, *y, x.settings.dilation) for y in of]
        outputs = operator._network(*half, *products, *x.weights, copies.flat(), *x.settings)[:4]
        leaves = [*half[1:3], *x.weights]
        gradients = torch.autograd.grad(outputs, leaves, [y.cos() for y in outputs])
        assert [y.dtype for y in gradients] == [y.dtype for y in leaves]
        found.append([*outputs, *gradients])
    assert equal(*found)


@pytest.mark.parametrize("name", ["THUMOS14", "release", "ActivityNet"])
@pytest.mark.parametrize("streams", [1, 2])
def test_apart_all_gradients_come_before_those_of_the_first_weights(device, name, streams, request):
    if "reference" in request.node.name:
        pytest.skip("autograd takes its own order")
    x = case(name, streams, device=device)
    order: list[int] = []
    for i, weight in enumerate(x.weights):
        weight.register_post_accumulate_grad_hook(lambda _, i=i: order.append(i))
    first = {6 * s for s in range(streams)}
    for apart in (True, False):
        order.clear()
        sum(y.sum() for y in network(*x, apart=apart) if y is not None).backward()
        assert sorted(order) == list(range(6 * streams))
        assert (set(order[-streams:]) == first) == apart


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["THUMOS14", "release", "ActivityNet"])
def test_gradients_are_derivatives(device, name, apart):
    x = case(name, d=4, device=device)

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        inputs = x.inputs._replace(x_a=leaves[0], x_b=leaves[1])
        return tuple(y for y in network(inputs, list(leaves[2:]), x.settings, apart=apart) if y is not None)

    mask = x.inputs.mask[:, None]
    inside = [torch.where(mask, y, 0).detach().requires_grad_() for y in x.inputs[1:3]]
    torch.autograd.gradcheck(lambda *w: outputs(*inside, *w), x.weights, fast_mode=True, nondet_tol=1e-10)


@pytest.mark.parametrize(("apart", "weight"), [(False, 0), (True, 0), (True, 2)])
def test_a_gradient_has_no_gradient(device, apart, weight, request):
    if "reference" in request.node.name:
        pytest.skip("plain PyTorch has one")
    x = case("THUMOS14", d=4, device=device)
    *_, embeddings = network(*x, apart=apart)
    (gradient,) = torch.autograd.grad(embeddings.sum(), x.weights[weight], create_graph=True)
    for leaf in (x.inputs.x_a, x.weights[0], x.weights[8]):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(gradient.sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("apart", [False, True])
def test_some_gradients_alone(device, apart):
    x, same = case("release", device=device), case("release")
    for leaf in (x.inputs.x_a, x.weights[0], x.weights[7]):
        leaf.requires_grad_(False)
    for output, weight in ((0, 2), (1, 8), (2, 2), (3, 2), (1, 6)):
        (ours,) = torch.autograd.grad(network(*x, apart=apart)[output].sum(), x.weights[weight])
        expected = network_ref(same.inputs, tuple(same.weights), same.settings)[output]
        torch.testing.assert_close(ours.cpu(), *torch.autograd.grad(expected.sum(), same.weights[weight]))


def test_only_the_features_of_one_stream(device):
    """Of a network that is trained already, through both nodes."""
    for name in ("THUMOS14", "release"):
        x, same = case(name, device=device), case(name)
        for leaf in x.leaves():
            leaf.requires_grad_(leaf is x.inputs.x_b)
        (ours,) = torch.autograd.grad(network(*x, apart=True)[1].sum(), x.inputs.x_b)
        expected = network_ref(same.inputs, tuple(same.weights), same.settings)[1]
        torch.testing.assert_close(ours.cpu(), *torch.autograd.grad(expected.sum(), same.inputs.x_b))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("streams", [1, 2])
def test_copies_of_the_weights_give_the_same(device, name, streams, request):
    x = case(name, streams, d=16, device=device)
    copies = copies_of(x)
    for ours, expected in zip(run(x, partial(network, copies=copies)), run(x), strict=True):
        torch.testing.assert_close(ours, expected)
    if "reference" in request.node.name:
        return  # it reads the weights
    with pytest.raises(InputError, match="copies of weights, expected"):
        network(*x, copies=copies._replace(first=[]))
    with pytest.raises(InputError, match=f"copy {streams} is"):
        network(*x, copies=copies._replace(second=[y[1:] for y in copies.second]))


def copies_of(x: Case) -> NetworkCopies:
    of = [StreamWeights(*x.weights[i : i + 6]) for i in range(0, len(x.weights), 6)]
    copies = NetworkCopies.blank(of, x.weights[0].dtype)
    for s, weights in enumerate(of):
        copies.first[s].copy_(weights.first.detach().mT)
        copies.second[s].copy_(weights.second.detach().mT)
        copies.reversed_second[s].copy_(reversed_taps(copies.second[s]))
        classifier = weights.classifier.detach().mT.reshape(-1, weights.classifier.shape[1])
        copies.classifier[s, : len(classifier)].copy_(classifier)
    return copies


@pytest.mark.parametrize("apart", [False, True])
def test_launches(simt_kernels, apart):
    """One pass for each layer of each stream, and one for logits and TCAM, both ways."""
    x = case("release")
    before = simt_kernels.enqueued()
    outputs = [y for y in network(*x, apart=apart) if y is not None]
    assert simt_kernels.enqueued() - before == 5
    torch.autograd.grad([y.sum() for y in outputs], x.leaves())
    assert simt_kernels.enqueued() - before == 11  # and one sum for all biases


@pytest.mark.parametrize("name", ["THUMOS14", "release"])
@pytest.mark.parametrize("streams", [1, 2])
def test_opcheck(name, streams):
    x = case(name, streams, dtype=torch.float32)
    weights = [*x.weights, *[None] * (12 - len(x.weights))]
    torch.library.opcheck(torch.ops.d2net.network.default, (*x.inputs, None, None, *weights, [], *x.settings))
    products = [torch.randn(len(x.inputs.mask), 19).requires_grad_() if s < streams else None for s in range(2)]
    torch.library.opcheck(torch.ops.d2net.network.default, (*x.inputs, *products, *weights, [], *x.settings))
    of_first = x.inputs.mask, x.inputs.x_a, x.weights[0]
    for copy in (None, copies_of(x).first[0]):
        torch.library.opcheck(torch.ops.d2net.first_layer.default, (*of_first, copy, x.settings.dilation))


def test_wrong_arguments(device, request):
    x = case("THUMOS14", device=device)
    inputs, weights, settings = x
    wrong = {
        "x_a has shape": inputs._replace(x_a=inputs.x_a[0]),
        "x_a has dtype": inputs._replace(x_a=inputs.x_a.detach().long()),
        "mask is": inputs._replace(mask=inputs.mask[1:]),
        "x_b is": inputs._replace(x_b=inputs.x_b[1:]),
        "seed is": inputs._replace(seed=torch.zeros(1, device=device)),
        "numbers is .*int32": inputs._replace(numbers=torch.zeros_like(inputs.mask, dtype=torch.int32)),
        "numbers is .*1,": inputs._replace(numbers=torch.zeros(1, dtype=torch.int64, device=device)),
    }
    for message, changed in wrong.items():
        with pytest.raises(InputError, match=message):
            network(changed, weights, settings)
    with pytest.raises(InputError, match="dropout is 1.0"):
        network(inputs, weights, settings._replace(dropout=1.0))
    with pytest.raises(InputError, match=r"second is .*odd"):
        network(inputs, [*weights[:2], weights[2][:, :, :2], *weights[3:]], settings)
    with pytest.raises(InputError, match="first_bias is"):
        network(inputs, [weights[0], weights[1][1:], *weights[2:]], settings)
    with pytest.raises(InputError, match="classifier of stream 2 is missing"):
        network(inputs, weights[:10], settings)
    with pytest.raises(InputError, match="must match"):
        network(inputs, [*weights[:4], weights[4][:3], weights[5][:3], *weights[6:]], settings)
    with pytest.raises(InputError, match="residual layers need features as wide"):
        network(inputs, weights, settings._replace(residual=True))
    for at, k in ((0, 5), (2, 5), (4, 1), (10, 1)):  # first, second, both classifiers
        changed = [*weights]
        changed[at] = weights[at].new_zeros(*weights[at].shape[:2], k)
        with pytest.raises(InputError, match="taps; those of the first two layers must be alike"):
            network(inputs, changed, settings)
    with pytest.raises(InputError, match="dilation is 0"):
        network(inputs, weights, settings._replace(dilation=0))
    with pytest.raises(InputError, match="wide, expected at least 1"):
        empty = inputs._replace(x_a=inputs.x_a[:, :0])
        network(empty, [weights[0][:, :0], *weights[1:]], settings)
    if "reference" not in request.node.name:  # which computes nothing apart
        check_wrong_products(x)
    if device.type == "cpu":
        with pytest.raises(InputError, match="the first and the last 1 rows must be gaps"):
            network(inputs._replace(mask=torch.ones_like(inputs.mask)), weights, settings)


def check_wrong_products(x: Case) -> None:
    (mask, x_a, *_), weights, settings = x
    y = x_a.new_zeros(len(mask), len(weights[0]))
    for products, message in (
        ((y, None), "every stream's first layer, or none"),
        ((None, y), "every stream's first layer, or none"),
        ((y[1:], y), "y_a is"),
        ((y, y[:, 1:]), "y_b is"),
        ((y, y.half()), "y_b is .*float16"),
    ):
        with pytest.raises(InputError, match=message):
            operator._network(*x.inputs, *products, *weights, [], *settings)
    first = weights[0]
    for arguments, message in (
        ((mask, x_a[0], first, None, 1), "first_layer: x has shape"),
        ((mask, x_a, first[:, 1:], None, 1), "first_layer: weight is"),
        ((mask, x_a, first[:, :, 1:], None, 1), "first_layer: weight is .*odd"),
        ((mask, x_a, first[:0], None, 1), "first_layer: weight is .*at least 1"),
        ((mask[1:], x_a, first, None, 1), "first_layer: mask is"),
        ((mask, x_a, first, None, 0), "first_layer: dilation is 0"),
        ((mask, x_a, first, None, 2**40), "expected gaps of 1099511627776"),
        ((mask, x_a, first, first, 1), "first_layer: copy is"),
    ):
        with pytest.raises(InputError, match=message):
            operator.first_layer(*arguments)
    grad = x_a.new_zeros(len(mask), len(first) + 1)
    with pytest.raises(InputError, match="first_layer_backward: grad is"):
        torch.ops.d2net.first_layer_backward(grad, mask, x_a, first, None, 1, True)
