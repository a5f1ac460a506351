"""Adam with copies of the weights in bfloat16 is PyTorch's fused Adam, and the copies are casts of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.model import D2Net
from d2net.ops.adam import WeightCopies, adam_step
from d2net.ops.temporal_conv import reversed_taps
from d2net.recipes import ModelRecipe
from d2net.training.adam import Adam


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "simt":
        request.getfixturevalue("simt_kernels")
        return torch.device("cpu")
    return torch.device("cuda")


def networks(device: torch.device, recipe: ModelRecipe, widths: tuple[int, ...]) -> tuple[D2Net, D2Net]:
    """One on the device, and the same on the CPU: PyTorch's kernel for GPUs rounds 1 - beta_2 to 4 digits."""
    models = []
    for place in (device, torch.device("cpu")):
        torch.manual_seed(0)
        models.append(D2Net(5, widths, recipe).to(place).order_weights())
    return models[0], models[1]


@pytest.mark.parametrize(
    ("recipe", "widths"),
    [
        (ModelRecipe(embedding_dim=40), (12, 12)),
        (ModelRecipe(kernel_size=5, dilation=2, embedding_dim=7), (6,)),
        (ModelRecipe(classifier_kernel_size=1, embedding_dim=130), (33, 9)),
    ],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_same_as_pytorch(device, recipe, widths, weight_decay):
    ours, usual = networks(device, recipe, widths)
    copies, of_parameters = ours.copies(torch.bfloat16)
    optimizer = Adam(ours.parameters(), lr=1e-2, weight_decay=weight_decay)
    optimizer.keep(of_parameters)
    expected = Adam(usual.parameters(), lr=1e-2, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for p, q in zip(ours.parameters(), usual.parameters(), strict=True):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad, q.grad = torch.empty_like(p).copy_(gradient), torch.empty_like(q).copy_(gradient)
        optimizer.step()
        expected.step()
        for ours_all, usual_all in (
            (optimizer.averages, expected.averages),
            (optimizer.squares, expected.squares),
            (optimizer.parameters, expected.parameters),
        ):
            for x, y in zip(ours_all, usual_all, strict=True):
                torch.testing.assert_close(x.cpu(), y, rtol=2e-6, atol=5e-8)  # of steps of 1e-2
        assert_copies(ours, copies)
    assert all(step.item() == 4 for step in optimizer.steps)


def assert_copies(model: D2Net, copies) -> None:
    streams = [s for s in (model.stream_a, model.stream_b) if s is not None]
    for s, stream in enumerate(streams):
        assert torch.equal(copies.first[s], stream.first.weight.mT.bfloat16())
        assert torch.equal(copies.second[s], stream.second.weight.mT.bfloat16())
        assert torch.equal(copies.reversed_second[s], reversed_taps(copies.second[s]))
        used = stream.classifier.weight.mT.reshape(-1, model.embedding_dim).bfloat16()
        assert torch.equal(copies.classifier[s, : len(used)], used)
        assert not copies.classifier[s, len(used) :].any()


@pytest.mark.parametrize(("d", "c"), [(46, 20), (45, 20), (20, 22), (7, 3)])
def test_gradients_of_a_backward_may_begin_anywhere(device, d, c, monkeypatch):
    """Those of the biases are parts of one tensor."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    models = [D2Net(c, (12, 9), ModelRecipe(embedding_dim=d)).to(place).order_weights() for place in (device, "cpu")]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Adam(model.parameters(), lr=1e-2, weight_decay=0) for model in models]
    _, of_parameters = models[0].copies(torch.bfloat16)
    optimizers[0].keep(of_parameters)
    features = torch.randn(2, 11, 21)
    for model, optimizer in zip(models, optimizers, strict=True):
        before = [p._version for p in model.parameters()]
        out = model(features.to(model.x_ref.device))
        (out.tcam.sum() + out.embeddings.sum()).backward()
        optimizer.step()
        if model is models[0]:  # so that autograd sees that they changed
            assert all(p._version > version for p, version in zip(model.parameters(), before, strict=True))
    for x, y in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=2e-3)  # a step of 1e-2 has the sign of the gradient


def test_copies_are_those_of_now(device):
    model, _ = networks(device, ModelRecipe(embedding_dim=8), (6, 6))
    copies, of_parameters = model.copies(torch.bfloat16)
    assert not copies.first[0].any()
    Adam(model.parameters(), lr=1e-3, weight_decay=0).keep(of_parameters)
    assert_copies(model, copies)


def test_wrong_weights(device):
    weights = [torch.zeros(2, device=device) for _ in range(13)]
    copies = [WeightCopies()] * 13
    rates, step = (1e-3, 0.9, 0.999, 1e-8, 0.0), torch.ones((), device=device)

    def call(of: list[Tensor]) -> None:
        adam_step(rates, step, of, of, of, of, copies=copies)

    with pytest.raises(InputError, match="up to 12 weights of float32, found 13"):
        call(weights)
    with pytest.raises(InputError, match="float32"):
        call([x.double() for x in weights[:2]])
    with pytest.raises(InputError, match="2 weights, but 1 gradients"):
        adam_step(rates, step, weights[:2], weights[:1], weights[:2], weights[:2], copies=copies[:2])
    with pytest.raises(InputError, match="does not lie in memory as"):
        contiguous = [torch.zeros(4, 3, 5, device=device)]
        adam_step(rates, step, contiguous, contiguous, contiguous, contiguous, copies=copies[:1])
