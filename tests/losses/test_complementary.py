"""Losses of other methods against their papers' definitions, one recording at a time, and for degenerate batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from d2net.errors import InputError
from d2net.losses import CoActivitySimilarity, D2NetLoss, SnippetContrast, UncertaintyModeling
from d2net.recipes import LossRecipe

LENGTHS = torch.tensor([40, 7, 2, 23, 39, 12])


def test_uncertainty_modeling(make_batch):
    tcam, embeddings, _, _ = make_batch()
    embeddings = 3 * embeddings
    logits = torch.logit(tcam)
    magnitude, entropy = [], []
    for x, score, n in zip(embeddings, logits, LENGTHS.tolist(), strict=True):
        order = x[:n].norm(dim=1).argsort(descending=True)
        act, background = order[: max(1, n // 9)], order[n - max(1, n // 4) :]
        short = max(0.0, 5 - x[act].mean(0).norm())
        magnitude.append((short + x[background].mean(0).norm()) ** 2)
        entropy.append(-score[background].mean(0).log_softmax(0).mean())
    result = UncertaintyModeling(magnitude=0.1, margin=5.0)(embeddings, logits, LENGTHS)
    torch.testing.assert_close(result.magnitude, sum(magnitude) / 6)
    torch.testing.assert_close(result.entropy, sum(entropy) / 6)
    torch.testing.assert_close(result.total, 0.1 * result.magnitude + result.entropy)


def test_uncertainty_modeling_beside_the_paper(make_batch):
    tcam, embeddings, lengths, labels = make_batch()
    partners = torch.roll(torch.arange(6), 1)
    paper = D2NetLoss(5, 8).double()(tcam, embeddings, lengths, labels, partners)
    recipe = LossRecipe(um_weight=0.5, um_magnitude=0.2, um_margin=3.0)
    past = torch.arange(40) >= lengths[:, None]
    logits = torch.logit(tcam, eps=1e-6).masked_fill(past[:, :, None], float("nan")).requires_grad_()
    loss = D2NetLoss(5, 8, recipe).double()
    result = loss(tcam, embeddings, lengths, labels, partners, logits=logits)
    alone = UncertaintyModeling(magnitude=0.2, margin=3.0)(embeddings, logits.detach(), lengths)
    torch.testing.assert_close(result.uncertainty, alone.total)
    torch.testing.assert_close(result.total, paper.total + 0.5 * alone.total)
    result.total.backward()
    assert logits.grad.isfinite().all() and (logits.grad[past] == 0).all()
    with pytest.raises(InputError, match="pass logits=output.logits"):
        loss(tcam, embeddings, lengths, labels, partners)


class TestMarginInUnitsOfTheEmbedding:
    def both(self, batch, scale=1.0):
        tcam, embeddings, *_ = batch
        embeddings = (scale * embeddings).requires_grad_()
        loss = UncertaintyModeling(margin=1.5, margin_unit="embedding")
        result = loss(embeddings, torch.logit(tcam), LENGTHS)
        return result, torch.autograd.grad(result.magnitude, embeddings)[0]

    def test_it_is_the_paper_s_with_that_margin_divided_by_the_unit(self, make_batch):
        """The unit has no gradient."""
        tcam, embeddings, *_ = make_batch()
        norms = [x[:n].norm(dim=1) for x, n in zip(embeddings, LENGTHS.tolist(), strict=True)]
        unit = torch.cat(norms).mean().item()
        absolute = UncertaintyModeling(margin=1.5 * unit)
        x = embeddings.clone().requires_grad_()
        expected = absolute(x, torch.logit(tcam), LENGTHS)
        (gradient,) = torch.autograd.grad(expected.magnitude, x)
        result, found = self.both(make_batch())
        torch.testing.assert_close(result.magnitude, expected.magnitude / unit**2)
        torch.testing.assert_close(found, gradient / unit**2)
        assert result.entropy == expected.entropy

    @pytest.mark.parametrize("scale", [1e-3, 250.0])
    def test_the_scale_of_the_embeddings_does_not_matter(self, make_batch, scale):
        (one, gradient), (other, scaled) = self.both(make_batch()), self.both(make_batch(), scale)
        torch.testing.assert_close(other.magnitude, one.magnitude)
        torch.testing.assert_close(scale * scaled, gradient)

    def test_zero_embeddings_are_the_margin_away(self, make_batch):
        result, gradient = self.both(make_batch(), 0.0)
        assert result.magnitude == 1.5**2 and not gradient.any()


def test_co_activity_similarity(make_batch):
    tcam, embeddings, _, labels = make_batch(c=3)
    labels[0, :2] = 1
    logits = 5 * tcam

    def features(i, c):
        n = int(LENGTHS[i])
        a, x = logits[i, :n, c].softmax(0), embeddings[i, :n]
        return a @ x, (1 - a) @ x / max(n - 1, 1)

    def distance(u, v):
        return 1 - F.cosine_similarity(u, v, dim=0)

    per_class = []
    for c in range(3):
        terms = []
        for m, n in itertools.combinations(torch.nonzero(labels[:, c]).flatten().tolist(), 2):
            (h_m, l_m), (h_n, l_n) = features(m, c), features(n, c)
            d = distance(h_m, h_n)
            terms.append(
                0.5 * (d - distance(h_m, l_n) + 0.5).clamp(min=0) + 0.5 * (d - distance(l_m, h_n) + 0.5).clamp(min=0)
            )
        if terms:
            per_class.append(sum(terms) / len(terms))
    assert len(per_class) >= 2
    loss = CoActivitySimilarity()(embeddings, logits, LENGTHS, labels)
    torch.testing.assert_close(loss, sum(per_class) / len(per_class))
    assert CoActivitySimilarity()(embeddings[:2], logits[:2], None, torch.eye(3, dtype=torch.float64)[:2]) == 0


def naive_snippet_contrast(embeddings, actionness, lengths):
    """SniCo with binary morphology as scipy.ndimage does it: an even element reaches one more to the past."""

    def dilate(on, width):
        reach = range(-((width - 1) // 2), width // 2 + 1)
        return {t for t in range(n) if any(t + r in on for r in reach)}

    def erode(on, width):
        return {t for t in on if all(t + r in on for r in range(-(width // 2), (width - 1) // 2 + 1))}

    def best(candidates, k, sign=1):
        return sorted(candidates, key=lambda t: -sign * float(a[t]))[:k]

    directions = [[], []]
    for x, a, n in zip(embeddings, actionness, lengths.tolist(), strict=True):
        ordered = sorted(a[:n].tolist())
        median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        on = {t for t in range(n) if a[t] > median}
        easy, hard = max(1, n // 5), max(1, n // 20)
        easy_act, easy_bkg = best(range(n), easy), best(range(n), easy, -1)
        hard_act = best(erode(on, 3) - erode(on, 6), hard)
        hard_bkg = best(dilate(on, 6) - dilate(on, 3), hard)
        pairs = ((hard_act, easy_act, easy_bkg), (hard_bkg, easy_bkg, easy_act))
        for found, (query, key, negatives) in zip(directions, pairs, strict=True):
            if query:
                q = x[query].mean(0)
                logits = [F.cosine_similarity(q, v, dim=0) / 0.07 for v in (x[key].mean(0), *x[negatives])]
                found.append(-torch.stack(logits).log_softmax(0)[0])
    return [sum(found) / len(found) for found in directions], [len(found) for found in directions]


@pytest.mark.parametrize("seed", range(4))
def test_snippet_contrast(make_batch, seed):
    tcam, embeddings, _, _ = make_batch(seed=seed)
    # Smooth, so that there are wide regions with borders.
    actionness = F.avg_pool1d(tcam.sum(2)[:, None], 9, stride=1, padding=4)[:, 0]
    expected, counts = naive_snippet_contrast(embeddings, actionness, LENGTHS)
    assert min(counts) > 0
    torch.testing.assert_close(SnippetContrast()(embeddings, actionness, LENGTHS), sum(expected))


def calls(embeddings, tcam, lengths, labels):
    logits = torch.logit(tcam, eps=1e-6)
    yield "um", UncertaintyModeling()(embeddings, logits, lengths).total
    yield "casl", CoActivitySimilarity()(embeddings, logits, lengths, labels)
    yield "snico", SnippetContrast()(embeddings, tcam.sum(2), lengths)


def test_degenerate_batches_are_finite(degenerate):
    tcam, embeddings, lengths, labels = degenerate
    if embeddings.abs().max().item() > 1e6 if embeddings.numel() else False:
        embeddings = embeddings / 1e8  # otherwise squared magnitudes exceed float32
    for which in range(3):
        t, x = tcam.clone().requires_grad_(), embeddings.clone().requires_grad_()
        name, loss = list(calls(x, t, lengths, labels))[which]
        assert torch.isfinite(loss), name
        loss.backward()
        for leaf in (t, x):
            assert leaf.grad is None or torch.isfinite(leaf.grad).all(), name


def test_gradients_and_padding(make_batch):
    tcam, embeddings, _, labels = make_batch(t=40, c=3, d=4)
    tcam = (0.02 + 0.9 * tcam).requires_grad_()
    embeddings.requires_grad_()
    for which in range(3):
        assert torch.autograd.gradcheck(
            lambda t, x, i=which: list(calls(x, t, LENGTHS, labels))[i][1], (tcam, embeddings), fast_mode=True
        )
    past = torch.arange(40) >= LENGTHS[:, None]
    t, x = (v.detach().masked_fill(past[:, :, None], float("nan")).requires_grad_() for v in (tcam, embeddings))
    for (_, a), (_, b) in zip(calls(embeddings, tcam, LENGTHS, labels), calls(x, t, LENGTHS, labels), strict=True):
        torch.testing.assert_close(a, b)
        (gradient,) = torch.autograd.grad(b, x, retain_graph=True)
        assert gradient.isfinite().all() and (gradient[past] == 0).all()


@pytest.mark.parametrize("loss", ["um", "casl", "snico"])
def test_compiles(make_batch, loss):
    torch._dynamo.reset()
    tcam, embeddings, lengths, labels = make_batch(dtype=torch.float32)
    module, arguments = {
        "um": (UncertaintyModeling(), (tcam, lengths)),
        "casl": (CoActivitySimilarity(), (tcam, lengths, labels)),
        "snico": (SnippetContrast(), (tcam.sum(2), lengths)),
    }[loss]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    embeddings.requires_grad_()
    gradients = []
    for f in (module, compiled):
        out = f(embeddings, *arguments)
        gradients.append(torch.autograd.grad(out.total if loss == "um" else out, embeddings))
    torch.testing.assert_close(*gradients)


def test_wrong_shapes_name_the_loss(make_batch):
    tcam, embeddings, lengths, labels = make_batch()
    with pytest.raises(InputError, match="UncertaintyModeling: embeddings"):
        UncertaintyModeling()(embeddings, tcam[:, :3], lengths)
    with pytest.raises(InputError, match="CoActivitySimilarity: labels"):
        CoActivitySimilarity()(embeddings, tcam, lengths, labels[:, :2])
    with pytest.raises(InputError, match="SnippetContrast: actionness"):
        SnippetContrast()(embeddings, tcam, lengths)


@pytest.mark.parametrize("wide", ["embeddings", "logits"])
def test_co_activity_takes_two_precisions(wide):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(4, 6, 5, dtype=torch.float64, generator=generator)
    logits = torch.randn(4, 6, 3, dtype=torch.float64, generator=generator)
    labels = torch.ones(4, 3)
    expected = CoActivitySimilarity()(embeddings, logits, None, labels)
    found = CoActivitySimilarity()(
        embeddings if wide == "embeddings" else embeddings.float(),
        logits if wide == "logits" else logits.float(),
        None,
        labels,
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
