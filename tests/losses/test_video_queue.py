"""``loss.video_queue``: U_2 is made of the batch and of the recordings seen last, of which no gradient is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.losses import D2NetLoss
from d2net.losses.video_denoising import VideoJoint
from d2net.ops import topk_pool
from d2net.recipes import LossRecipe, load_recipe


def make_loss(size: int, classes: int = 5, **settings: object) -> D2NetLoss:
    return D2NetLoss(classes, 8, LossRecipe(video_queue=size, **settings)).double()  # type: ignore[arg-type]


def expected(recordings: list[tuple[Tensor, Tensor]]) -> Tensor:
    """L_DV of scores and labels, from its definition (Eq. 7 and 10)."""
    p = torch.stack([p for p, _ in recordings]).clamp(1e-6, 1 - 1e-6)
    y = torch.stack([y for _, y in recordings]).to(p.dtype)
    sigma = torch.linalg.svdvals(p.T @ y / len(recordings))
    sigma = sigma[sigma > 1e-5]
    return (sigma[0] / sigma[-1]).log()


@pytest.mark.parametrize("size", [1, 4, 6, 15])
@pytest.mark.parametrize("denoise_first", [True, False])
def test_the_last_recordings_that_count_join_the_batch(make_batch, size: int, denoise_first: bool) -> None:
    """Also those of steps without L_D; one that does not count takes no place."""
    loss = make_loss(size, skip_unlabelled=True)
    before: list[tuple[Tensor, Tensor]] = []  # newest first
    for step in range(4):
        tcam, embeddings, lengths, labels = make_batch(seed=step, power=1)
        labels[step] = 0
        tcam.requires_grad_()
        result = loss(tcam, embeddings, lengths, labels, denoise=denoise_first or step > 0)
        counted = [i for i in range(6) if labels[i].any()]
        p = topk_pool(tcam, lengths)
        now = [(p[i], labels[i]) for i in counted]
        if denoise_first or step > 0:
            wanted = expected(now + before)
            torch.testing.assert_close(result.video, wanted)
            gradients = (torch.autograd.grad(term, tcam, retain_graph=True)[0] for term in (result.video, wanted))
            torch.testing.assert_close(*gradients)
        before = ([(p.detach(), y) for p, y in now] + before)[:size]


def test_the_rank_grows_with_the_queue() -> None:
    """Two recordings of six classes a batch: rank 2 without a queue, all six from the third batch on with one."""
    eye = torch.eye(6, dtype=torch.float64)
    found: dict[int, list[int]] = {}
    for size in (0, 4, 2):
        loss, found[size] = make_loss(size, classes=6), []
        assert isinstance(loss.video, VideoJoint)
        for step in range(4):
            labels = eye[[2 * step % 6, (2 * step + 1) % 6]]
            tcam = (0.1 + 0.8 * labels)[:, None].expand(2, 9, 6)
            recordings = topk_pool(tcam), torch.tensor([9, 9]), labels
            p, y = loss.video.factors(*(recordings if loss.queue is None else loss.queue.after(*recordings)))
            found[size].append(int(torch.linalg.matrix_rank(p @ y)))
            loss(tcam, torch.ones(2, 9, 8, dtype=torch.float64), None, labels)
    assert found == {0: [2, 2, 2, 2], 2: [2, 4, 4, 4], 4: [2, 4, 6, 6]}


def test_classes_that_occur_together_in_a_batch_are_told_apart() -> None:
    """In each batch two classes always come together, in the next ones with others: U_2 of each batch has rank 2."""
    batches = [[[1, 1, 0, 0], [0, 0, 1, 1]], [[1, 0, 1, 0], [0, 1, 0, 1]]]
    ranks = []
    for size in (0, 8):
        loss = make_loss(size, classes=4)
        assert isinstance(loss.video, VideoJoint)
        for rows in batches:
            labels = torch.tensor(rows, dtype=torch.float64)
            tcam = (0.1 + 0.8 * labels)[:, None].expand(2, 9, 4)
            recordings = topk_pool(tcam), torch.tensor([9, 9]), labels
            p, y = loss.video.factors(*(recordings if loss.queue is None else loss.queue.after(*recordings)))
            loss(tcam, torch.ones(2, 9, 8, dtype=torch.float64), None, labels)
        ranks.append(int(torch.linalg.matrix_rank(p @ y)))
    assert ranks == [2, 3]


def test_an_empty_queue_changes_nothing(make_batch) -> None:
    batch = make_batch(power=1)
    results = []
    for size in (0, 7):
        tcam = batch.tcam.clone().requires_grad_()
        total = make_loss(size)(tcam, *batch[1:], torch.arange(6).roll(1)).total
        results.append((total.detach(), torch.autograd.grad(total, tcam)[0]))
    torch.testing.assert_close(*results)


def test_steps_do_not_hold_on_to_each_other(make_batch) -> None:
    """Each step can go backward after the ones before it have freed their graphs."""
    loss = make_loss(12)
    for step in range(3):
        tcam, *rest = make_batch(seed=step)
        loss(tcam.requires_grad_(), *rest).total.backward()
    assert loss.queue is not None and not loss.queue.pooled.requires_grad


def test_an_evaluation_adds_nothing(make_batch) -> None:
    loss = make_loss(12)
    loss(*make_batch(seed=0))
    before = {name: t.clone() for name, t in loss.state_dict().items()}
    loss.eval()
    first = loss(*make_batch(seed=1, power=1)).video
    assert all(torch.equal(t, before[name]) for name, t in loss.state_dict().items())
    assert first == loss(*make_batch(seed=1, power=1)).video != make_loss(0)(*make_batch(seed=1, power=1)).video


def test_a_loss_goes_on_with_its_state(make_batch) -> None:
    loss, other = make_loss(9), make_loss(9)
    for step in range(2):
        loss(*make_batch(seed=step))
    other.load_state_dict(loss.state_dict())
    partners = torch.arange(6).roll(1)
    for step in range(2, 5):
        results = [each(*make_batch(seed=step), partners) for each in (loss, other)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_stays_float32_in_a_loss_in_half_precision(make_batch, dtype: torch.dtype) -> None:
    loss = D2NetLoss(5, 8, LossRecipe(video_queue=9))
    batch = make_batch(dtype=torch.float32)
    loss(*batch)
    assert loss.queue is not None
    before = loss.queue.pooled.clone()
    loss = loss.to(dtype)
    assert loss.queue.pooled.dtype == loss.queue.labels.dtype == torch.float32
    assert torch.equal(loss.queue.pooled, before) and loss.queue.counted.dtype == torch.int64
    assert loss(batch.tcam.to(dtype), batch.embeddings.to(dtype), *batch[2:]).video.dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [{"video_queue": 0}, {"alpha_video": 0}, {"denoising": "bce"}, {"denoising": "l1"}],
    ids=lambda settings: next(iter(settings)),
)
def test_no_state_where_no_term_has_a_joint_matrix_of_recordings(settings: dict[str, object]) -> None:
    loss = D2NetLoss(5, 8, replace(load_recipe("thumos14-release").loss, **{"video_queue": 4, **settings}))
    assert list(loss.state_dict()) == ["reference"]


@pytest.mark.parametrize("value", [-1, 2.5, None, True, 65_537])
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(InputError, match="loss.video_queue is .*; it must be"):
        LossRecipe(video_queue=value)  # type: ignore[arg-type]
