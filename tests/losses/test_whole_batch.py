"""The loss of a batch that lies on several ranks is that of one process, and so is every gradient."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from d2net.distributed import lost_ranks
from d2net.errors import InputError
from d2net.losses import D2NetLoss
from d2net.losses.whole_batch import WholeBatch, gathered
from d2net.recipes import load_recipe

C, D = 5, 12
PAPER = load_recipe("thumos14-paper").loss
CASES = {
    "paper": PAPER,
    "released": load_recipe("thumos14-release").loss,
    "permutation": replace(PAPER, pairing="permutation"),
    "focal": replace(PAPER, classification="focal"),
    "l1": replace(PAPER, denoising="l1"),
    "bce": replace(PAPER, denoising="bce"),
    "dmi": replace(PAPER, denoising="dmi", video_normalization="per_class"),
    "queue": replace(PAPER, video_queue=6),
    "own classes": replace(PAPER, snippet_own_classes=True),
    "oriented": replace(PAPER, snippet_oriented=True),
    "lowest": replace(PAPER, reference_update="lowest_attention"),
    "mean": replace(PAPER, embedding_pooling="mean", class_reduction="mean", balance_classes=True),
    "um": replace(PAPER, um_weight=0.3, um_margin=2.0),
    "um by norms": replace(PAPER, um_weight=0.3, um_margin=2.0, um_margin_unit="embedding"),
    "skips": replace(PAPER, skip_unlabelled=True, min_snippets=5),
}
OPTIONS = [
    *((name, {"packed": True}) for name in CASES),
    *((name, {"packed": False}) for name in ("paper", "lowest", "um", "own classes")),
    ("paper", {"packed": True, "gives_partners": True}),
]
# Which rank has which recordings of the whole batch.
DEALS = {
    1: [[0, 1, 2, 3, 4, 5, 6]],
    2: [[0, 2, 5, 6], [1, 3, 4]],
    3: [[0, 1, 6], [2, 4], [3, 5]],
    4: [[1, 5], [0, 2], [3, 6], [4]],
}
PARTNERS = torch.tensor([1, 2, 3, 4, 5, 6, 0])


def make(dtype: torch.dtype = torch.float64):
    """TCAMs, embeddings and labels of recordings of unequal lengths; 3 and 5 have no foreground, 6 has no label."""
    generator = torch.Generator().manual_seed(3)
    tcam, x = [], []
    for i, n in enumerate([9, 17, 4, 6, 30, 5, 12]):
        high = 0.3 if i in (3, 5) else 1.0
        tcam.append(torch.rand(n, C, generator=generator, dtype=torch.float64) * high)
        x.append(torch.randn(n, D, generator=generator, dtype=torch.float64))
    labels = torch.eye(C)[torch.arange(7) % C] + torch.eye(C)[(torch.arange(7) * 3 + 1) % C]
    labels[6] = 0
    return [t.to(dtype) for t in tcam], [y.to(dtype) for y in x], labels.clamp(max=1)


def mine() -> list[int]:
    return DEALS[torch.distributed.get_world_size()][torch.distributed.get_rank()]


def dealt(labels: torch.Tensor) -> WholeBatch:
    deal = DEALS[torch.distributed.get_world_size()]
    most = max(map(len, deal))
    place = {i: rank * most + n for rank, some in enumerate(deal) for n, i in enumerate(some)}
    return WholeBatch(labels, torch.tensor([place[i] for i in range(7)]), most)


def steps(recipe, some, whole_of=None, *, packed, seed=11, dtype=torch.float64, gives_partners=False):
    """Two steps of the loss of some recordings, the second without L_D: terms and gradients of each; x_ref then."""
    tcam, x, labels = make(dtype)
    tcam, x = [tcam[i].requires_grad_() for i in some], [x[i].requires_grad_() for i in some]
    lengths = torch.tensor([len(t) for t in tcam])
    loss = D2NetLoss(C, D, recipe)
    loss.reference.copy_(torch.linspace(-1, 1, D))
    generator = torch.Generator().manual_seed(seed)
    results = []
    for denoise in (True, False):
        both = tuple(torch.nn.utils.rnn.pad_sequence(y, batch_first=True) for y in (tcam, x))
        where = {}
        if packed:
            both = torch.cat(tcam), torch.cat(x)
            where = {"offsets": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), "max_length": 30}
        found = loss(
            *both,
            lengths,
            labels[some],
            PARTNERS if gives_partners else None,
            generator,
            logits=torch.logit(both[0].clamp(1e-3, 1 - 1e-3)),
            denoise=denoise,
            whole=whole_of(labels) if whole_of else None,
            **where,
        )
        gradients = torch.autograd.grad(found.total, [*tcam, *x], allow_unused=True)
        results.append(([float(y.detach()) for y in found], [None if g is None else g.numpy() for g in gradients]))
    return results, loss.reference.numpy().copy()


def on_ranks(cases):
    """Each case on this rank. Other ranks than 0 would draw other pairs, which must not count."""
    seed = 11 + torch.distributed.get_rank()
    return [steps(recipe, mine(), dealt, seed=seed, **options) for recipe, options in cases]


def assert_equal(one, many, deal, tolerance) -> None:
    (alone, x_ref), n = one, sum(map(len, deal))
    for rank, (found, other_x_ref) in enumerate(many):
        torch.testing.assert_close(torch.tensor(other_x_ref), torch.tensor(x_ref), rtol=1e-6, atol=1e-6)
        for (terms, gradients), (wanted_terms, wanted) in zip(found, alone, strict=True):
            torch.testing.assert_close(torch.tensor(terms), torch.tensor(wanted_terms), rtol=tolerance, atol=tolerance)
            for first, places in ((0, deal[rank]), (n, [n + i for i in deal[rank]])):  # of the TCAMs, of the embeddings
                of_all = wanted[first : first + n]
                largest = max((abs(w).max() for w in of_all if w is not None), default=0)
                for j, i in enumerate(places):
                    got, want = gradients[j + (len(deal[rank]) if first else 0)], wanted[i]
                    difference = (0 if got is None else got) - (0 if want is None else want)
                    assert np.max(np.abs(difference)) <= tolerance * largest


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_loss_and_its_gradients_are_those_of_one_process(processes, size):
    cases = [(CASES[name], options) for name, options in OPTIONS]
    many = processes.run(size, on_ranks, cases)
    for n, (recipe, options) in enumerate(cases):
        alone = steps(recipe, list(range(7)), **options)
        assert_equal(alone, [of_rank[n] for of_rank in many], DEALS[size], 1e-9)


def test_in_float32(processes):
    many = processes.run(3, on_ranks, [(PAPER, {"packed": True, "dtype": torch.float32})])
    alone = steps(PAPER, list(range(7)), packed=True, dtype=torch.float32)
    assert_equal(alone, [of_rank[0] for of_rank in many], DEALS[3], 2e-5)


def each_alone(recipe):
    """What plain data-parallel training computes: each rank the loss of its own recordings."""
    return steps(recipe, mine(), packed=True)


def test_without_the_gather_it_is_another_loss(processes):
    """So the test above fails where the gather is left out."""
    alone, x_ref = steps(PAPER, list(range(7)), packed=True)
    found = processes.run(2, each_alone, PAPER)
    for term in range(4):
        mean = sum(results[0][0][term] for results, _ in found) / 2
        assert abs(mean / alone[0][0][term] - 1) > 1e-3
    assert all(abs(other - x_ref).max() > 1e-3 for _, other in found)


def loop_of_ones_own():
    tcam, x, labels = make()
    some = [range(3), range(3, 7)][torch.distributed.get_rank()]
    whole = WholeBatch.of(labels[some])
    lengths = torch.tensor([len(tcam[i]) for i in some])
    padded = (torch.nn.utils.rnn.pad_sequence([y[i] for i in some], batch_first=True) for y in (tcam, x))
    total = D2NetLoss(C, D, PAPER)(*padded, lengths, labels[some], PARTNERS, whole=whole).total
    return float(total), whole.labels.numpy(), whole.places.tolist(), whole.most


def test_the_whole_batch_of_a_loop_of_ones_own(processes):
    tcam, x, labels = make()
    padded = (torch.nn.utils.rnn.pad_sequence(y, batch_first=True) for y in (tcam, x))
    lengths = torch.tensor([len(t) for t in tcam])
    wanted = float(D2NetLoss(C, D, PAPER)(*padded, lengths, labels, PARTNERS).total)
    for total, found, places, most in processes.run(2, loop_of_ones_own):
        assert total == pytest.approx(wanted, rel=1e-12)
        assert (found == labels.numpy()).all()
        assert (places, most) == ([0, 1, 2, 4, 5, 6, 7], 4)


def misuse():
    """What is said of each wrong use; nothing where it was taken."""
    rank = torch.distributed.get_rank()
    tcam, x, labels = torch.rand(2, 6, C), torch.randn(2, 6, D), torch.ones(2, C)
    loss, said = D2NetLoss(C, D, PAPER), []
    for make in (
        lambda: WholeBatch.of(torch.ones(2, 3 + rank)),
        lambda: WholeBatch.of(torch.ones(3)),
        lambda: loss(tcam, x, None, labels, whole=WholeBatch.of(torch.ones(3, C))),
        lambda: loss(tcam, x, None, labels, whole=WholeBatch.of(torch.ones(1, C))),
        lambda: loss(tcam, x, None, labels, whole=WholeBatch.of(torch.ones(2, C + 1))),
        lambda: loss(tcam, x, None, labels, whole=WholeBatch.of(labels.long())),
    ):
        try:
            make()
            said.append("")
        except InputError as error:
            said.append(str(error))
    return said


def test_wrong_use_is_an_error_on_all_ranks(processes):
    for classes, dimensions, more, fewer, others, fine in processes.run(2, misuse):
        assert "[3, 4] classes; they must match" in classes
        assert "expected (b, C)" in dimensions
        assert "this rank has 3 recordings, at most 3, of 5 classes; the batch has 2 of 5" in more
        assert "this rank has 1 recordings" in fewer
        assert "of 6 classes; the batch has 2 of 5" in others
        assert fine == ""


def gathers():
    x = torch.full((2, 3), 1.0 + torch.distributed.get_rank(), requires_grad=True)
    (gathered(x) * torch.arange(12.0).view(2, 2, 3)).sum().backward()
    return x.grad.numpy()


def test_the_gradient_of_the_gather_is_the_ranks_own_share(processes):
    first, second = processes.run(2, gathers)
    assert first.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert second.flatten().tolist() == [6, 7, 8, 9, 10, 11]


def test_without_a_process_group():
    with pytest.raises(InputError, match="init_process_group"):
        WholeBatch.of(torch.ones(2, 3))


def test_other_errors_are_no_lost_rank():
    with pytest.raises(RuntimeError, match="^mine$"), lost_ranks():
        raise RuntimeError("mine")
