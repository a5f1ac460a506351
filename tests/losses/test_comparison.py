"""The losses of Tables 3 and 4 and plain DMI against their definitions, one recording at a time."""

from __future__ import annotations

import pytest
import torch

from d2net import equations
from d2net.errors import InputError
from d2net.losses import (
    CrossEntropyLoss,
    D2NetLoss,
    FocalLoss,
    SnippetBCE,
    SnippetDMI,
    SnippetL1,
    VideoBCE,
    VideoDMI,
    VideoL1,
)
from d2net.recipes import load_recipe


def pooled(tcam, lengths):
    """p of every recording that has a snippet."""
    return [equations.class_scores(t[:n]) for t, n in zip(tcam, lengths.tolist(), strict=True) if n]


@pytest.mark.parametrize("beta", [0, 2])
def test_focal_and_cross_entropy(make_batch, beta):
    tcam, _, lengths, labels = make_batch()
    lengths[2] = 0
    rows = zip(pooled(tcam, lengths), labels[lengths > 0], strict=True)
    terms = [equations.discriminative_loss(p, y, beta=beta) for p, y in rows]
    loss = FocalLoss(beta=2.0) if beta else CrossEntropyLoss()
    assert loss(tcam, lengths, labels).item() == pytest.approx(sum(terms).item() / 5, rel=1e-9)


def test_cross_entropy_is_pytorchs(make_batch):
    tcam, _, lengths, labels = make_batch()
    p = torch.stack(pooled(tcam, lengths))
    expected = torch.nn.functional.binary_cross_entropy(p, labels, reduction="sum") / 6
    torch.testing.assert_close(CrossEntropyLoss()(tcam, lengths, labels), expected)


def pseudo_labelled(tcam, embeddings, lengths, x_ref):
    """lambda and pseudo-label of the pseudo-labelled snippets of every recording that has a snippet."""
    for t, x, n in zip(tcam, embeddings, lengths.tolist(), strict=True):
        if n:
            score = equations.bottom_up_attention(x[:n], x_ref)
            selected = score != 0.5
            yield equations.attention(t[:n])[selected], (score > 0.5).double()[selected]


@pytest.mark.parametrize("kind", ["l1", "bce"])
def test_pointwise_losses(make_batch, kind):
    tcam, embeddings, lengths, labels = make_batch()
    lengths[1] = 0
    x_ref = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def between(p, y):
        return (p - y).abs() if kind == "l1" else -(y * p.log() + (1 - y) * (1 - p).log())

    snippets = [between(a, y).mean() for a, y in pseudo_labelled(tcam, embeddings, lengths, x_ref) if len(a)]
    assert len(snippets) == 5
    snippet = SnippetL1() if kind == "l1" else SnippetBCE()
    torch.testing.assert_close(snippet(tcam, embeddings, lengths, x_ref), sum(snippets) / 5)
    videos = [between(p, y).mean() for p, y in zip(pooled(tcam, lengths), labels[lengths > 0], strict=True)]
    video = VideoL1() if kind == "l1" else VideoBCE()
    torch.testing.assert_close(video(tcam, lengths, labels), sum(videos) / 5)


def test_snippet_dmi(make_batch):
    tcam, embeddings, lengths, _ = make_batch()
    x_ref = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    terms = []
    for t, x, n in zip(tcam, embeddings, lengths.tolist(), strict=True):
        u = equations.snippet_joint(t[:n], equations.bottom_up_attention(x[:n], x_ref))
        terms.append(-torch.linalg.det(u).abs().log())
    torch.testing.assert_close(SnippetDMI()(tcam, embeddings, lengths, x_ref), sum(terms) / 6)


def test_video_dmi(make_batch):
    tcam, _, lengths, labels = make_batch(b=9, c=3)
    assert labels.any(0).all()
    expected = equations.dmi_loss(torch.stack(pooled(tcam, lengths), 1), labels)
    tcam.requires_grad_()
    loss = VideoDMI()(tcam, lengths, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert tcam.grad.abs().sum() > 0
    labels[:, 1] = 0  # a class is missing, so U is singular, although rounding may make its determinant nonzero
    assert VideoDMI()(tcam, lengths, labels) == 0


def test_gradients(make_batch):
    tcam, embeddings, lengths, labels = make_batch(b=5, t=12, c=2, d=4, power=2)
    tcam = (0.02 + 0.9 * tcam).requires_grad_()
    x_ref = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for snippet in (SnippetL1(), SnippetBCE(), SnippetDMI()):
        assert torch.autograd.gradcheck(lambda t, f=snippet: f(t, embeddings, lengths, x_ref), tcam, fast_mode=True)
    for video in (VideoL1(), VideoBCE(), VideoDMI(), FocalLoss(), CrossEntropyLoss()):
        assert torch.autograd.gradcheck(lambda t, f=video: f(t, lengths, labels), tcam, fast_mode=True)


@pytest.mark.parametrize(
    ("settings", "dis", "snippet", "video"),
    [
        (
            ["loss.classification=cross_entropy", "loss.alpha_snippet=0", "loss.alpha_video=0"],
            CrossEntropyLoss(),
            None,
            None,
        ),
        (["loss.classification=focal", "loss.alpha_snippet=0", "loss.alpha_video=0"], FocalLoss(), None, None),
        (["loss.denoising=l1"], None, SnippetL1(), VideoL1()),
        (["loss.denoising=bce"], None, SnippetBCE(), VideoBCE()),
        (["loss.denoising=dmi"], None, SnippetDMI(), VideoDMI()),
    ],
    ids=["cross-entropy", "focal", "l1", "bce", "dmi"],
)
def test_a_recipe_reaches_every_comparison(make_batch, settings, dis, snippet, video):
    tcam, embeddings, lengths, labels = make_batch(b=9, c=3)
    recipe = load_recipe("thumos14-paper").override(settings)
    loss = D2NetLoss.from_recipe(recipe.loss, num_classes=3, embedding_dim=8).double()
    result = loss(tcam, embeddings, lengths, labels, torch.roll(torch.arange(9), 1))
    assert loss.reference.abs().sum() > 0  # localization needs x_ref with every loss
    paper = D2NetLoss(3, 8).double()(tcam, embeddings, lengths, labels, torch.roll(torch.arange(9), 1))
    torch.testing.assert_close(result.discriminative, dis(tcam, lengths, labels) if dis else paper.discriminative)
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(result.snippet, snippet(tcam, embeddings, lengths, loss.reference) if snippet else zero)
    torch.testing.assert_close(result.video, video(tcam, lengths, labels) if video else zero)
    torch.testing.assert_close(result.total, result.discriminative + 0.2 * (result.snippet + result.video))


def test_wrong_shapes_name_the_loss(make_batch):
    tcam, embeddings, lengths, labels = make_batch()
    with pytest.raises(InputError, match="VideoL1: labels"):
        VideoL1()(tcam, lengths, labels[:, :2])
    with pytest.raises(InputError, match="FocalLoss: tcam"):
        FocalLoss()(tcam[0], lengths, labels)
    with pytest.raises(InputError, match="SnippetDMI: tcam"):
        SnippetDMI()(tcam, embeddings[:, :3], lengths, torch.zeros(8))
    with pytest.raises(InputError, match="own_classes needs the labels"):
        SnippetL1(own_classes=True)(tcam, embeddings, lengths, torch.zeros(8, dtype=torch.float64))
