"""``loss.snippet_oriented``: recordings of which U_1 is swapped do not count in L_DS; the others are as they were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from d2net import equations
from d2net.losses import D2NetLoss, SnippetDenoising, SnippetDMI, bottom_up_attention
from d2net.losses.denoising import SnippetJoint
from d2net.recipes import LossRecipe, load_recipe

X_REF = torch.tensor([-1.0, 0.0], dtype=torch.float64)


def of_pseudo_labels(attention: list[list[float]], foreground: list[list[int]]) -> tuple[Tensor, Tensor]:
    """A TCAM (B, T, 1) with this attention, and embeddings of which X_REF makes these pseudo-labels."""
    labels = torch.tensor(foreground, dtype=torch.float64)
    embeddings = torch.stack((2 * labels - 1, 0.1 * torch.ones_like(labels)), 2)
    return torch.tensor(attention, dtype=torch.float64)[:, :, None].requires_grad_(), embeddings


RIGHT, SWAPPED, UNDECIDED = [0.9, 0.7, 0.2, 0.3], [0.2, 0.4, 0.7, 0.6], [0.5, 0.3, 0.3, 0.5]
PSEUDO = [1, 1, 0, 0]


@pytest.mark.parametrize("loss", [SnippetDenoising, SnippetDMI])
@pytest.mark.parametrize("normalization", ["joint", "per_class"])
def test_a_swapped_recording_does_not_count(loss: type[SnippetJoint], normalization: str) -> None:
    tcam, embeddings = of_pseudo_labels([SWAPPED, RIGHT, UNDECIDED], [PSEUDO] * 3)
    alone = loss(normalization=normalization)(tcam[1:2], embeddings[1:2], None, X_REF)
    (expected,) = torch.autograd.grad(alone, tcam)
    found = loss(normalization=normalization, oriented=True)(tcam, embeddings, None, X_REF)
    (gradient,) = torch.autograd.grad(found, tcam)
    torch.testing.assert_close(found, alone)
    torch.testing.assert_close(gradient, expected)
    assert (gradient[1] != 0).all()


def descend(loss: SnippetDenoising, attention: list[float]) -> float:
    """det U_1 after some steps down the gradient of L_DS."""
    tcam, embeddings = of_pseudo_labels([attention], [PSEUDO])
    for _ in range(50):
        (gradient,) = torch.autograd.grad(loss(tcam, embeddings, None, X_REF), tcam)
        tcam = (tcam - 0.01 * gradient).clamp(0, 1).detach().requires_grad_()
    return torch.linalg.det(loss.joint(tcam[:, :, 0], embeddings[:, :, 0], torch.tensor([4]))[0]).item()


@pytest.mark.parametrize("attention", [RIGHT, SWAPPED])
def test_it_sharpens_only_what_is_not_swapped(attention: list[float]) -> None:
    """Without it a swapped U_1 gets more so: that is what it is for."""
    plain, oriented = SnippetDenoising(), SnippetDenoising(oriented=True)
    tcam, embeddings = of_pseudo_labels([attention], [PSEUDO])
    before = torch.linalg.det(plain.joint(tcam[:, :, 0], embeddings[:, :, 0], torch.tensor([4]))[0]).item()
    after = descend(plain, attention)
    assert abs(after) > 1.2 * abs(before) and (after < 0) == (before < 0) == (attention is SWAPPED)
    if attention is SWAPPED:
        assert oriented(tcam, embeddings, None, X_REF).item() == 0
    else:
        assert descend(oriented, attention) == pytest.approx(after)


def test_none_is_left(make_batch) -> None:
    tcam, embeddings = of_pseudo_labels([SWAPPED, UNDECIDED], [PSEUDO] * 2)
    loss = SnippetDenoising(oriented=True)(tcam, embeddings, None, X_REF)
    assert loss.item() == 0 and not torch.autograd.grad(loss, tcam)[0].any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("recipe", ["thumos14-paper", "thumos14-release"])
def test_the_whole_loss_has_the_mean_of_what_counts(make_batch, recipe: str, seed: int) -> None:
    """Against every recording alone; the other terms have the same bits as without it."""
    tcam, embeddings, lengths, labels = make_batch(b=8, seed=seed, power=1)
    partners = torch.arange(8).roll(1)
    settings: LossRecipe = replace(load_recipe(recipe).loss, pairing="different")
    plain, oriented = (D2NetLoss(5, 8, replace(settings, snippet_oriented=on)).double().eval() for on in (False, True))
    for loss in (plain, oriented):
        loss.reference.copy_(torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    foreground = bottom_up_attention(embeddings, plain.reference)[:, :, None] > 0.5
    tcam[::2] = torch.where(foreground, 0.6 + 0.4 * tcam, 0.6 * tcam)[::2]
    tcam[1::4] = torch.where(foreground, 0.6 * tcam, 0.6 + 0.4 * tcam)[1::4]  # swapped
    t = tcam.clone().requires_grad_()
    result, before = (loss(t, embeddings, lengths, labels, partners) for loss in (oriented, plain))
    terms = []
    for i, n in enumerate(lengths.tolist()):
        one = tcam[i : i + 1, :n], embeddings[i : i + 1, :n], None, labels[i : i + 1]
        attention, scores = tcam[i, :n].amax(1), equations.bottom_up_attention(embeddings[i, :n], plain.reference)
        if settings.snippet_own_classes:
            own = tcam[i, :n, labels[i] > 0].amax(1)
            attention = torch.where(scores > 0.5, own, attention)
        if attention[scores > 0.5].mean() > attention[scores < 0.5].mean():
            terms.append(plain(*one).snippet)
    assert 4 <= len(terms) <= 6
    torch.testing.assert_close(result.snippet, torch.stack(terms).mean())
    assert result.discriminative == before.discriminative and result.video == before.video
    expected = before.total + settings.alpha_snippet * (result.snippet - before.snippet)
    torch.testing.assert_close(result.total, expected)
    assert torch.autograd.grad(result.total, t)[0].isfinite().all()


def test_nan_is_not_hidden() -> None:
    tcam, embeddings = of_pseudo_labels([SWAPPED, [0.2, torch.nan, 0.7, 0.6]], [PSEUDO] * 2)
    assert SnippetDenoising(oriented=True)(tcam, embeddings, None, X_REF).isnan()
