"""docs/fidelity.md: where gradients go, and where L_DS is smallest."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from d2net.losses import D2NetLoss
from d2net.ops import snippet_pdmi
from d2net.recipes import load_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "fidelity.md").read_text(encoding="utf-8")
RECIPES = pytest.mark.parametrize("recipe", ["thumos14-paper", "thumos14-release"])


def loss_of(recipe, batch, denoising="pdmi"):
    values = load_recipe(recipe).override([f"loss.denoising={denoising}"]).loss
    loss = D2NetLoss(batch.tcam.shape[2], batch.embeddings.shape[2], values).double()
    loss.reference.copy_(torch.randn(batch.embeddings.shape[2], generator=torch.Generator().manual_seed(0)))
    tcam, embeddings = batch.tcam.clone().requires_grad_(), batch.embeddings.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    return loss(tcam, embeddings, batch.lengths, batch.labels, generator=generator), tcam, embeddings, loss


@RECIPES
@pytest.mark.parametrize("denoising", ["pdmi", "dmi", "l1", "bce"])
def test_only_the_discriminative_loss_has_a_gradient_to_the_embeddings(make_batch, recipe, denoising):
    result, tcam, embeddings, loss = loss_of(recipe, make_batch(b=12), denoising)
    for term, reaches in ((result.discriminative, True), (result.snippet, False), (result.video, False)):
        gradients = torch.autograd.grad(term, (tcam, embeddings), retain_graph=True, materialize_grads=True)
        assert gradients[0].any()
        assert bool(gradients[1].any()) == reaches
    assert not loss.reference.requires_grad  # x_ref is a constant in lambda'


@RECIPES
def test_the_weights_of_eq_3_have_a_gradient_to_the_attention(make_batch, recipe):
    """Below the k largest of every class p does not depend on T: a gradient there comes through x_fg and x_bg."""
    batch = make_batch(power=1)
    result, tcam, _, _ = loss_of(recipe, batch)
    (gradient,) = torch.autograd.grad(result.discriminative, tcam)
    through_the_weights = 0
    for i, s in enumerate(batch.lengths.tolist()):
        k = math.ceil(s / 8)
        t, g = batch.tcam[i, :s], gradient[i, :s]
        pooled = t >= t.topk(k, 0).values[-1]
        top_down = t == t.max(1, keepdim=True).values
        through_the_weights += int((g[top_down & ~pooled] != 0).sum())
        assert not g[~top_down & ~pooled].any()
    assert through_the_weights > 20


SNIPPETS = 100


def snippet_loss(foreground, of_foreground, of_background, normalization):
    """L_DS of recordings of 100 snippets, ``foreground`` of them pseudo-foreground; lambda is the same on each side."""
    attention = torch.stack((of_foreground, of_background), 1).double()
    counts = torch.tensor([foreground, SNIPPETS - foreground])
    scores = torch.tensor([0.9, 0.1]).repeat_interleave(counts).expand(len(attention), -1)
    loss, valid = snippet_pdmi(attention.repeat_interleave(counts, 1), scores, normalization=normalization)
    assert valid.all()
    return loss


def minimum(foreground):
    """(lambda_f, lambda_b), the first above the second, where L_DS with Y_1 / z is smallest: the page's closed form."""
    few, many = sorted((foreground / SNIPPETS, 1 - foreground / SNIPPETS))
    moved = 1 - math.sqrt((few**2 + many**2) / (2 * many**2))
    return (1.0, moved) if foreground <= SNIPPETS / 2 else (1 - moved, 0.0)


@pytest.mark.parametrize("foreground", [1, 5, 10, 20, 30, 40, 50, 60, 80, 95])
def test_where_the_snippet_loss_is_smallest(foreground):
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 101, dtype=torch.float64)] * 2)
    grid = grid[grid[:, 0] > grid[:, 1]]  # the other half mirrors it: the next test
    on_grid = snippet_loss(foreground, *grid.T, "joint")
    at = torch.tensor([minimum(foreground), (1.0, 0.0)], dtype=torch.float64)
    smallest, identity = snippet_loss(foreground, *at.T, "joint")
    assert (grid[on_grid.argmin()] - at[0]).abs().max() < 0.01  # a step of the grid
    assert smallest <= on_grid.min() + 1e-9
    assert identity.item() == pytest.approx(abs(math.log(foreground / (SNIPPETS - foreground))), abs=1e-9)
    assert smallest < identity - 1e-3 or foreground == 50
    released = snippet_loss(foreground, *grid.T, "per_class")
    assert grid[released.argmin()].tolist() == [1, 0] and released.min().abs() < 1e-9


@pytest.mark.parametrize("normalization", ["joint", "per_class"])
def test_the_snippet_loss_does_not_know_which_side_is_up(normalization):
    generator = torch.Generator().manual_seed(0)
    f, b = torch.rand(2, 50, generator=generator)
    torch.testing.assert_close(
        snippet_loss(20, f, b, normalization), snippet_loss(20, 1 - f, 1 - b, normalization), rtol=1e-6, atol=1e-6
    )


def test_the_table_of_the_page():
    rows = []
    for foreground in (5, 10, 20, 30, 50):
        at = torch.tensor([minimum(foreground), (1.0, 0.0)], dtype=torch.float64)
        smallest, identity = (max(0.0, x) for x in snippet_loss(foreground, *at.T, "joint").tolist())
        moved = minimum(foreground)[1]
        below = sum(t < moved for t in load_recipe("thumos14-paper").localization.thresholds)
        rows.append(f"| {foreground} % | (1, {moved:.2f}) | {smallest:.2f} | {identity:.2f} | {below} of 20 |")
    rows[-1] = rows[-1].replace("(1, 0.00)", "(1, 0)")
    assert "\n".join(rows) in PAGE, "\n".join(rows)
