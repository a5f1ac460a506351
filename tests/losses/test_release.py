"""The release recipes: against numbers of the authors' code, and against its rules one recording at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2net.losses import D2NetLoss, draw_permutations


def padded(permutation: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat((permutation, torch.arange(len(permutation), size)))


@pytest.mark.parametrize("case", ["a", "c"])
def test_published_code(shared, case):
    data = np.load(shared / "oracles" / f"release_loss_{case}.npz")
    tcam, embeddings = (torch.tensor(data[k], requires_grad=True) for k in ("tcam", "feat"))
    b, _, c = tcam.shape
    loss = D2NetLoss.from_recipe("thumos14-release", num_classes=c, embedding_dim=embeddings.shape[2])
    loss.reference.copy_(torch.tensor(data["ref_before"][0]))
    partners = torch.stack([padded(torch.tensor(data[f"perm{i}"]), b) for i in range(4)])
    result = loss(tcam, embeddings, torch.tensor(data["lengths"]), torch.tensor(data["labels"]), partners)
    np.testing.assert_allclose(loss.reference, data["ref_after"][0], rtol=1e-5, atol=1e-7)
    for name, term in (("dis", result.discriminative), ("lds", result.snippet), ("ldv", result.video)):
        assert term.item() == pytest.approx(float(data[name]), rel=1e-5)
        gradients = torch.autograd.grad(term, (tcam, embeddings), retain_graph=True, materialize_grads=True)
        for gradient, expected in zip(gradients, (data[f"{name}_gtc"], data[f"{name}_gf"]), strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    torch.testing.assert_close(result.total, result.discriminative + 0.1 * result.snippet + 0.1 * result.video)


def naive_release(tcam, embeddings, lengths, labels, x_ref, activitynet, generator):
    """The rules of the released code, one recording at a time. Also returns the permutations that it drew, padded."""
    c = tcam.shape[2]
    divisor, bg_tau, pseudo_bg = (4, 0.8, 0.3) if activitynet else (8, 0.5, 0.5)
    counted = [i for i in range(len(tcam)) if lengths[i] >= 5 and labels[i].sum() > 0]
    fg, bg, lowest, with_fg, with_bg, p = [], [], [], [], [], []
    for number, i in enumerate(counted):
        t, x = tcam[i, : lengths[i]], embeddings[i, : lengths[i]]
        attention = t.max(1).values
        p.append(t.topk(-(-len(t) // divisor), 0).values.mean(0))
        for weights, tau, found, owners in (
            (attention, 0.5, fg, with_fg),
            (1 - attention, bg_tau, bg, with_bg),
        ):
            weights = torch.where(weights < tau, 0, weights)
            if weights.sum() > 0:
                found.append((weights[:, None] * x).sum(0) / weights.sum())
                owners.append(number)
        if with_bg and with_bg[-1] == number:
            lowest.append(x[attention.argmin()].detach())
    n_fg, n_bg = len(fg), len(bg)
    perms = [torch.randperm(n, generator=generator) for n in (n_fg, n_bg, n_fg, n_bg)]
    w = tcam.new_zeros(3, len(counted)).unbind()
    w = [list(row) for row in w]
    for j in range(n_fg):
        w[0][with_fg[j]] = 0.01 * (1 - F.cosine_similarity(fg[j], fg[perms[0][j]], dim=0))
    for j in range(n_bg):
        w[1][with_bg[j]] = 0.01 * (1 - F.cosine_similarity(bg[j], bg[perms[1][j]], dim=0))
    for j in range(min(n_fg, n_bg)):  # the row counts all recordings, the embedding only those that have one
        w[2][perms[2][j]] = F.cosine_similarity(fg[perms[2][j]], bg[perms[3][j]], dim=0).clamp(min=0)
    if lowest:
        x_ref = 0.9 * x_ref + 0.1 * torch.stack(lowest).mean(0)
    padded_perms = torch.stack([padded(perm, len(tcam)) for perm in perms])
    zero = (tcam.sum() + embeddings.sum()) * 0
    if not counted:
        return zero, zero, zero, x_ref, padded_perms

    dis = zero
    for number, i in enumerate(counted):
        for k in range(c):
            q = p[number][k].clamp(1e-3, 1 - 1e-3)
            if labels[i, k]:
                dis = dis - c * (1 - q + w[0][number] + w[2][number]) ** 2 * q.log()
            else:
                dis = dis - (q + w[1][number] + w[2][number]) ** 2 * (1 - q).log()
    dis = dis / (len(counted) * c)

    lds, n = zero, 0
    for i in counted:
        t, x = tcam[i, : lengths[i]], embeddings[i, : lengths[i]]
        score = (1 - F.cosine_similarity(x, x_ref[None], dim=1)) / 2
        f = t[:, labels[i] > 0].max(1).values[score > 0.5]
        g = t.max(1).values[score < pseudo_bg]
        if len(f) and len(g):
            rows = [torch.stack((v.mean(), (1 - v).mean())) for v in (f, g)]
            sigma = torch.linalg.svdvals(torch.stack(rows).clamp(min=1e-10))
            lds, n = lds + (sigma[0] / sigma[1]).log(), n + 1
    lds = lds / max(n, 1)

    predictions = []
    for q in p:
        q = q.clamp(1e-3, 1 - 1e-3)
        q = q * (q > 0.2 * q.max())
        predictions.append(q / q.sum())
    y = labels[counted].T
    sigma = torch.linalg.svdvals(y / y.sum(1, keepdim=True).clamp(min=1) @ torch.stack(predictions))
    sigma = sigma[sigma > 1e-5]
    return dis, lds, (sigma.max() / sigma.min()).log(), x_ref, padded_perms


CASES = {
    "usual": lambda t, n, y: (t, n, y),
    "some without foreground": lambda t, n, y: (t * torch.tensor([0.4, 1, 0.4, 1, 1, 0.3])[:, None, None], n, y),
    "some without background": lambda t, n, y: (
        1 - (1 - t) * torch.tensor([0.1, 1, 1, 1, 0.1, 1])[:, None, None],
        n,
        y,
    ),
    "both": lambda t, n, y: (
        1
        - (1 - t * torch.tensor([0.4, 1, 1, 0.4, 1, 1])[:, None, None])
        * torch.tensor([1, 0.1, 1, 1, 1, 0.1])[:, None, None],
        n,
        y,
    ),
    "no foreground": lambda t, n, y: (0.4 * t, n, y),
    "no background": lambda t, n, y: (0.9 + 0.1 * t, n, y),
    "short": lambda t, n, y: (t, torch.tensor([4, 5, 40, 0, 1, 33]), y),
    "unlabelled": lambda t, n, y: (t, n, y * torch.tensor([1.0, 0, 1, 0, 1, 1])[:, None]),
    "none counts": lambda t, n, y: (t, n.clamp(max=4), y),
    "two classes each": lambda t, n, y: (t, n, (y + y.roll(1, 1)).clamp(max=1)),
    "own classes silent": lambda t, n, y: (t * (1 - y)[:, None], n, y),
    "at tau": lambda t, n, y: (
        torch.where((t > 0.1) & (t < 0.3), 0.2, torch.where((t > 0.4) & (t < 0.6), 0.5, t)),
        n,
        y,
    ),
    "saturated": lambda t, n, y: (torch.where(t > 0.8, 1, t), n, y),
}


@pytest.mark.parametrize("recipe", ["thumos14-release", "activitynet12-release"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_rules_one_recording_at_a_time(make_batch, case, recipe):
    for seed in range(2):
        batch = make_batch(seed=seed, power=6)
        tcam, lengths, labels = CASES[case](batch.tcam, batch.lengths, batch.labels)
        tcam, embeddings = tcam.double().requires_grad_(), batch.embeddings.clone().requires_grad_()
        generator = torch.Generator().manual_seed(seed)
        loss = D2NetLoss.from_recipe(recipe, num_classes=5, embedding_dim=8).double()
        loss.reference.copy_(torch.randn(8, generator=generator))
        *terms, x_ref, partners = naive_release(
            tcam, embeddings, lengths, labels, loss.reference.clone(), "activity" in recipe, generator
        )
        result = loss(tcam, embeddings, lengths, labels, partners)
        torch.testing.assert_close(loss.reference, x_ref)
        for term, expected in zip((result.discriminative, result.snippet, result.video), terms, strict=True):
            if expected > 15:  # U_1 is singular: the released code's value is made of rounding errors
                continue
            assert term.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
            if case in ("saturated", "at tau"):  # the rules do not say which of equal entries gets the gradient
                continue
            inputs = (tcam, embeddings)
            torch.testing.assert_close(
                torch.autograd.grad(term, inputs, retain_graph=True, materialize_grads=True),
                torch.autograd.grad(expected, inputs, retain_graph=True, materialize_grads=True),
                rtol=1e-5,
                atol=1e-9,
            )


def test_permutations_begin_with_one_of_the_valid_numbers():
    counts = torch.tensor([0, 1, 3, 5])
    seen = set()
    for seed in range(30):
        drawn = draw_permutations(counts, 5, torch.Generator().manual_seed(seed))
        for row, n in zip(drawn.tolist(), counts.tolist(), strict=True):
            assert sorted(row[:n]) == list(range(n)) and sorted(row) == list(range(5))
        seen.add(tuple(drawn[2, :3].tolist()))
    assert len(seen) == 6  # with the identity: a recording may be paired with itself


def test_drawn_permutations_are_repeatable_and_used(make_batch):
    batch = make_batch()
    totals = []
    for seed in (1, 1, 2):
        loss = D2NetLoss.from_recipe("thumos14-release", num_classes=5, embedding_dim=8).double()
        totals.append(loss(*batch, generator=torch.Generator().manual_seed(seed)).total)
    assert totals[0] == totals[1] != totals[2]


def test_padding_never_matters(make_batch):
    tcam, embeddings, lengths, labels = make_batch()
    past = torch.arange(40) >= lengths[:, None]
    results = []
    for filler in (0.0, 0.7, float("nan")):
        t = tcam.masked_fill(past[:, :, None], filler).requires_grad_()
        e = embeddings.masked_fill(past[:, :, None], filler).requires_grad_()
        loss = D2NetLoss.from_recipe("thumos14-release", num_classes=5, embedding_dim=8).double()
        for _ in range(2):
            result = loss(t, e, lengths, labels, torch.roll(torch.arange(6), 1).expand(4, 6))
        result.total.backward()
        assert (t.grad[past] == 0).all() and (e.grad[past] == 0).all()
        results.append((result.total.detach(), t.grad, e.grad, loss.reference))
    assert results[0][0].isfinite()
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)
