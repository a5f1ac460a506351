"""The losses against hand-computed values, invariances and degenerate batches."""

from __future__ import annotations

import math

import pytest
import torch

from d2net.errors import InputError
from d2net.losses import D2NetLoss, bottom_up_attention, draw_partners
from d2net.recipes import LossRecipe


def make_batch(b=6, t=40, c=5, d=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    tcam = torch.rand(b, t, c, generator=g, dtype=dtype)
    embeddings = torch.randn(b, t, d, generator=g, dtype=dtype)
    lengths = torch.randint(5, t + 1, (b,), generator=g)
    labels = torch.zeros(b, c, dtype=dtype)
    labels[torch.arange(b), torch.randint(c, (b,), generator=g)] = 1
    return tcam, embeddings, lengths, labels


def naive_loss(tcam, embeddings, lengths, labels, partners, reference, recipe):
    """Eq. 1 to 11, one recording at a time, as the paper writes them."""

    def cosine(u, v):
        return float(u @ v / (u.norm() * v.norm()))

    b = len(tcam)
    fg, bg, p = [], [], []
    for i in range(b):
        s = int(lengths[i])
        activation, x = tcam[i, :s], embeddings[i, :s]
        attention = activation.max(1).values
        fg.append(sum((a * v for a, v in zip(attention, x, strict=True) if a > 0.5), torch.zeros_like(x[0])))
        bg.append(sum(((1 - a) * v for a, v in zip(attention, x, strict=True) if 1 - a > 0.5), torch.zeros_like(x[0])))
        k = math.ceil(s / recipe.topk_divisor)
        p.append(activation.topk(k, 0).values.mean(0))
    dis = 0.0
    for i in range(b):
        j = int(partners[i])
        exists = [bool(v.abs().sum() > 0) for v in (fg[i], bg[i], fg[j], bg[j])]
        w_fb = max(0.0, cosine(fg[i], bg[j])) if exists[0] and exists[3] else 0.0
        w_fg = recipe.gamma * (1 - cosine(fg[i], fg[j])) if exists[0] and exists[2] else 0.0
        w_bg = recipe.gamma * (1 - cosine(bg[i], bg[j])) if exists[1] and exists[3] else 0.0
        for c in range(labels.shape[1]):
            q = float(p[i][c])
            if labels[i, c]:
                dis -= (1 - q + w_fg + w_fb) ** recipe.beta * math.log(q)
            else:
                dis -= (q + w_bg + w_fb) ** recipe.beta * math.log(1 - q)
    some_bg = [v for v in bg if v.abs().sum() > 0]
    if some_bg:
        reference = 0.9 * reference + 0.1 * torch.stack(some_bg).mean(0)
    snippet, counted = 0.0, 0
    for i in range(b):
        s = int(lengths[i])
        attention = tcam[i, :s].max(1).values
        score = torch.tensor([0.5 * (1 - cosine(v, reference)) for v in embeddings[i, :s]])
        f, g = attention[score > 0.5], attention[score < 0.5]
        if len(f) and len(g):
            u = torch.stack([torch.stack([f.sum(), g.sum()]), torch.stack([(1 - f).sum(), (1 - g).sum()])])
            sigma = torch.linalg.svdvals(u / (len(f) + len(g)))
            snippet += float((sigma[0] / sigma[1]).log())
            counted += 1
    sigma = torch.linalg.svdvals(torch.stack(p).T @ labels / b)
    sigma = sigma[sigma > 1e-5]
    return dis / b, snippet / max(counted, 1), float((sigma[0] / sigma[-1]).log()), reference


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_equations_one_recording_at_a_time(seed):
    # Eighth powers of uniform numbers: some snippets without, some with, a foreground.
    tcam, embeddings, lengths, labels = make_batch(seed=seed)
    tcam = tcam**4
    partners = torch.roll(torch.arange(6), 1)
    loss = D2NetLoss(5, 8).double()
    start = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    loss.reference.copy_(start)
    result = loss(tcam, embeddings, lengths, labels, partners=partners)
    dis, snippet, video, reference = naive_loss(tcam, embeddings, lengths, labels, partners, start, LossRecipe())
    assert result.discriminative.item() == pytest.approx(dis, rel=1e-9)
    assert result.snippet.item() == pytest.approx(snippet, rel=1e-9)
    assert result.video.item() == pytest.approx(video, rel=1e-9)
    assert result.total.item() == pytest.approx(dis + 0.2 * (snippet + video), rel=1e-9)
    torch.testing.assert_close(loss.reference, reference)


def test_gradients():
    tcam, embeddings, lengths, labels = make_batch(b=4, t=12, c=3, d=4)
    loss = D2NetLoss(3, 4).double().eval()
    loss.reference.copy_(torch.randn(4, dtype=torch.float64))
    partners = torch.tensor([1, 2, 3, 0])
    tcam = (0.02 + 0.9 * tcam**2).requires_grad_()
    embeddings.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t, e: loss(t, e, lengths, labels, partners=partners).total, (tcam, embeddings), eps=1e-7, atol=1e-5
    )


def test_padding_never_matters():
    tcam, embeddings, lengths, labels = make_batch()
    partners = torch.roll(torch.arange(6), 1)
    results = []
    for filler in (0.0, 0.7, float("nan")):
        past = torch.arange(40) >= lengths[:, None]
        t = tcam.masked_fill(past[:, :, None], filler).requires_grad_()
        e = embeddings.masked_fill(past[:, :, None], filler).requires_grad_()
        loss = D2NetLoss(5, 8).double()
        result = loss(t, e, lengths, labels, partners=partners)
        result.total.backward()
        results.append((result.total.detach(), t.grad, e.grad, loss.reference))
        assert (t.grad[past] == 0).all() and (e.grad[past] == 0).all()
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


def degenerate():
    z, o = torch.zeros, torch.ones
    lengths = torch.tensor([10, 7, 3, 1])
    one = torch.eye(4)[:, :3]
    yield "no foreground", z(4, 10, 3), torch.randn(4, 10, 6), lengths, one
    yield "no background", o(4, 10, 3), torch.randn(4, 10, 6), lengths, one
    yield "at the threshold", o(4, 10, 3) / 2, torch.randn(4, 10, 6), lengths, one
    yield "zero embeddings", torch.rand(4, 10, 3), z(4, 10, 6), lengths, one
    yield "one recording", torch.rand(1, 10, 3), torch.randn(1, 10, 6), lengths[:1], one[:1]
    yield "no recording", torch.rand(0, 10, 3), torch.randn(0, 10, 6), lengths[:0], one[:0]
    yield "no snippet", torch.rand(4, 10, 3), torch.randn(4, 10, 6), z(4, dtype=torch.int64), one
    yield "some empty", torch.rand(4, 10, 3), torch.randn(4, 10, 6), torch.tensor([0, 7, 0, 3]), one
    yield "no label", torch.rand(4, 10, 3), torch.randn(4, 10, 6), lengths, z(4, 3)
    yield "same label", torch.rand(4, 10, 3), torch.randn(4, 10, 6), lengths, o(4, 3)
    yield "same recording", torch.rand(1, 10, 3).repeat(4, 1, 1), torch.randn(1, 10, 6).repeat(4, 1, 1), None, one
    yield "everything equal", torch.full((4, 10, 3), 0.7), o(4, 10, 6), lengths, one


@pytest.mark.parametrize("case", list(degenerate()), ids=lambda c: c[0])
def test_degenerate_batches_are_finite(case):
    _, tcam, embeddings, lengths, labels = case
    tcam, embeddings = tcam.clone().requires_grad_(), embeddings.clone().requires_grad_()
    loss = D2NetLoss(3, 6)
    for _ in range(2):
        result = loss(tcam, embeddings, lengths, labels)
    result.total.backward()
    assert all(torch.isfinite(term) for term in result)
    assert torch.isfinite(tcam.grad).all() and torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(loss.reference).all()


def test_reference_is_a_running_mean_in_training_only():
    tcam, embeddings, lengths, labels = make_batch(dtype=torch.float32)
    loss = D2NetLoss(5, 8).eval()
    loss(tcam**4, embeddings, lengths, labels)
    assert (loss.reference == 0).all()
    loss.train()
    loss(tcam**4, embeddings, lengths, labels)
    first = loss.reference.clone()
    assert first.abs().sum() > 0
    loss(tcam**4, embeddings, lengths, labels)
    torch.testing.assert_close(loss.reference, first * 1.9)
    assert "reference" in loss.state_dict()


@pytest.mark.parametrize("valid", [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0] * 5])
def test_partners_are_other_valid_recordings(valid):
    valid = torch.tensor(valid, dtype=torch.bool)
    seen = set()
    for seed in range(40):
        partners = draw_partners(valid, torch.Generator().manual_seed(seed))
        assert sorted(partners.tolist()) == list(range(5))
        own = partners == torch.arange(5)
        assert valid[partners][valid].all()
        assert torch.equal(own, ~valid if valid.sum() > 1 else torch.ones(5, dtype=torch.bool))
        seen.add(tuple(partners.tolist()))
    assert len(seen) > 1 or valid.sum() < 3


def test_generator_makes_it_repeatable():
    tcam, embeddings, lengths, labels = make_batch()
    totals = [
        D2NetLoss(5, 8).double()(tcam, embeddings, lengths, labels, generator=torch.Generator().manual_seed(s)).total
        for s in (1, 1, 2)
    ]
    assert totals[0] == totals[1] != totals[2]


def test_bottom_up_attention():
    x = torch.tensor([[[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]])
    torch.testing.assert_close(bottom_up_attention(x, torch.tensor([5.0, 0.0])), torch.tensor([[0.0, 1.0, 0.5, 0.5]]))


def test_wrong_shapes_name_what_is_wrong():
    tcam, embeddings, lengths, labels = make_batch(dtype=torch.float32)
    loss = D2NetLoss(5, 8)
    for arguments, message in [
        ((tcam[0], embeddings, lengths, labels), "tcam has shape"),
        ((tcam, embeddings[:, :3], lengths, labels), "must match"),
        ((tcam, embeddings, lengths[:2], labels), "lengths"),
        ((tcam, embeddings, lengths, labels[:, :2]), "labels"),
        ((tcam[:, :, :4], embeddings, lengths, labels[:, :4]), "classes"),
        ((tcam, embeddings, lengths, labels, torch.zeros(2, dtype=torch.int64)), "partners"),
    ]:
        with pytest.raises(InputError, match=message):
            loss(*arguments)
