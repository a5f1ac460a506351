"""The page of equations against the fast operators, each for itself; the whole loss is in losses/test_paper.py."""

from __future__ import annotations

import pytest
import torch

from d2net import equations, ops
from d2net.localization import Localizer
from d2net.losses import DiscriminativeLoss
from d2net.model import D2Net


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("s", [1, 7, 8, 9, 100])
def test_head_attention_and_scores(draw, s):
    out = D2Net(5, stream_widths=(4, 6)).double()(8 * draw(1, s, 10) - 4)
    tcam = equations.class_activations(out.logits_a[0], out.logits_b[0])
    torch.testing.assert_close(out.tcam[0], tcam)
    pool = ops.tcam_pool(tcam[None])
    torch.testing.assert_close(pool.attention[0], equations.attention(tcam))
    torch.testing.assert_close(pool.pooled[0], equations.class_scores(tcam))


@pytest.mark.parametrize("power", [0.1, 1, 10])  # mostly foreground, both, mostly background
def test_eq_2(draw, power):
    tcam, x = draw(30, 3) ** power, draw(30, 6)
    pooled = ops.attention_pool(x[None], equations.attention(tcam)[None])
    for name, expected in zip(("fg", "bg"), equations.foreground_and_background(tcam, x), strict=True):
        assert bool(getattr(pooled, f"valid_{name}")) == (expected is not None)
        if expected is not None:
            torch.testing.assert_close(getattr(pooled, f"x_{name}")[0], expected)


def test_eq_4_without_weights_is_the_focal_loss(draw):
    p, y = draw(4, 5), (draw(4, 5) > 0.5).double()
    focal = DiscriminativeLoss(embedding_pooling="sum")
    # One snippet a recording is its own top k, and embeddings of zero have no direction: gamma alone is left of Eq. 3.
    found = focal(p[:, None], torch.zeros(4, 1, 2).double(), None, y, partners=torch.full((4,), -1)).loss
    expected = torch.stack([equations.discriminative_loss(*row) for row in zip(p, y, strict=True)]).mean()
    torch.testing.assert_close(found, expected)


def test_eq_5_and_6(draw):
    labels = torch.eye(3, dtype=torch.float64)
    p = draw(3, 3)
    assert equations.dmi_loss(3 * labels, labels) == 0  # the identity: no loss
    assert equations.pdmi_loss(labels) == 0
    assert equations.dmi_loss(p, labels) == pytest.approx(-(p / 3).det().abs().log().item())


@pytest.mark.parametrize("shape", [(2, 2), (5, 5), (20, 20)])
def test_eq_7(draw, shape):
    u = draw(3, *shape)
    u[1, :, 1:] = u[1, :, :1]  # of rank 1
    u[2] = 0
    found = ops.log_condition_number(u)
    torch.testing.assert_close(found, torch.stack([equations.pdmi_loss(one) for one in u]))
    assert found[0] > 0 and found[1:].tolist() == [0, 0]


def test_eq_8_to_10(draw):
    tcam, x, x_ref = draw(40, 4), draw(40, 6) - 0.5, draw(6) - 0.5
    scores = equations.bottom_up_attention(x, x_ref)
    torch.testing.assert_close(ops.bottom_up_attention(x[None], x_ref)[0], scores)
    u_1 = equations.snippet_joint(tcam, scores)
    found, valid = ops.snippet_pdmi(equations.attention(tcam)[None], scores[None])
    assert valid.item()
    torch.testing.assert_close(found[0], equations.pdmi_loss(u_1))
    assert equations.snippet_joint(tcam, torch.ones(40)) is None

    p, y = draw(3, 4), (draw(3, 4) > 0.5).double()
    found = ops.joint_log_condition_number(p.T[None], y[None] / 3)
    torch.testing.assert_close(found[0], equations.pdmi_loss(equations.video_joint(list(p), list(y))))


@pytest.mark.parametrize("s", [1, 2, 25, 200])
def test_sec_3_3(draw, s):
    localizer = Localizer.from_recipe("thumos14-paper")
    for _ in range(5):
        smooth = torch.nn.functional.avg_pool1d(draw(4, s), 5, 1, 2).T if s > 5 else draw(s, 4)
        scores = draw(s)
        found = localizer(smooth, scores)
        expected = equations.localize(smooth, scores)
        assert list(zip(*(x.tolist() for x in found[1:4]), strict=True)) == [row[:3] for row in expected]
        torch.testing.assert_close(found.score, torch.tensor([row[3] for row in expected], dtype=torch.float64))
