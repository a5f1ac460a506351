"""The paper's losses against its equations one recording at a time, invariances and degenerate batches."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from d2net import equations
from d2net.errors import InputError
from d2net.losses import (
    D2NetLoss,
    Denoising,
    DenoisingLoss,
    bottom_up_attention,
)
from d2net.recipes import LossRecipe, load_recipe


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_equations_one_recording_at_a_time(make_batch, seed):
    tcam, embeddings, lengths, labels = make_batch(seed=seed)
    tcam.requires_grad_()
    embeddings.requires_grad_()
    partners = torch.roll(torch.arange(6), 1)
    loss = D2NetLoss(5, 8).double()
    start = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    loss.reference.copy_(start)
    result = loss(tcam, embeddings, lengths, labels, partners=partners)

    own = [tcam[i, :s] for i, s in enumerate(lengths)], [embeddings[i, :s] for i, s in enumerate(lengths)]
    total, x_ref = equations.total_loss(*own, list(labels), partners.tolist(), start)
    snippet, video = equations.denoising_losses(*own, list(labels), x_ref)
    assert result.total.item() == pytest.approx(total.item(), rel=1e-12)
    assert result.snippet.item() == pytest.approx(snippet.item(), rel=1e-9)
    assert result.video.item() == pytest.approx(video.item(), rel=1e-9)
    torch.testing.assert_close(loss.reference, x_ref)
    expected = torch.autograd.grad(total, (tcam, embeddings))
    for found, gradient in zip(torch.autograd.grad(result.total, (tcam, embeddings)), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def test_gradients(make_batch):
    tcam, embeddings, lengths, labels = make_batch(b=4, t=12, c=3, d=4, power=2)
    loss = D2NetLoss(3, 4).double().eval()
    loss.reference.copy_(torch.randn(4, dtype=torch.float64))
    partners = torch.tensor([1, 2, 3, 0])
    tcam = (0.02 + 0.9 * tcam).requires_grad_()
    embeddings.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t, e: loss(t, e, lengths, labels, partners=partners).total, (tcam, embeddings), eps=1e-7, atol=1e-5
    )


def test_padding_never_matters(make_batch):
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


VARIANTS = {
    "paper": LossRecipe(),
    "release": load_recipe("thumos14-release").loss,
    "activitynet release": load_recipe("activitynet12-release").loss,
    "focal, l1": LossRecipe(classification="focal", denoising="l1"),
    "cross-entropy, bce": LossRecipe(classification="cross_entropy", denoising="bce"),
    "dmi": LossRecipe(denoising="dmi"),
    "um": LossRecipe(um_weight=1.0),
    "oriented": LossRecipe(snippet_oriented=True),
    "release, oriented": replace(load_recipe("thumos14-release").loss, snippet_oriented=True),
    "um, in units": LossRecipe(um_weight=1.0, um_margin=2.0, um_margin_unit="embedding"),
    "queue": LossRecipe(video_queue=7),
    "release, queue": replace(load_recipe("thumos14-release").loss, video_queue=20),
    "dmi, queue": LossRecipe(denoising="dmi", video_queue=20),
    "dmi, oriented": LossRecipe(denoising="dmi", snippet_oriented=True),
}


def logits_for(recipe, tcam):
    """Logits where the recipe has a term of them."""
    return 8 * tcam - 4 if recipe.um_weight else None


@pytest.mark.parametrize("recipe", VARIANTS.values(), ids=VARIANTS)
def test_degenerate_batches_are_finite(degenerate, recipe):
    tcam, embeddings, lengths, labels = degenerate
    tcam, embeddings = tcam.clone().requires_grad_(), embeddings.clone().requires_grad_()
    loss = D2NetLoss(tcam.shape[2], 6, recipe)
    for _ in range(2):
        result = loss(tcam, embeddings, lengths, labels, logits=logits_for(recipe, tcam))
    result.total.backward()
    assert all(torch.isfinite(term) for term in result)
    assert torch.isfinite(tcam.grad).all()
    assert embeddings.grad is None or torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(loss.reference).all()


@pytest.mark.parametrize("recipe", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("labelled", [3, 1, 0])
def test_skipped_unlabelled_recordings_are_as_if_they_were_not_there(make_batch, recipe, labelled):
    recipe = replace(recipe, skip_unlabelled=True)
    tcam, embeddings, lengths, labels = make_batch(power=1)
    labels[labelled:] = 0
    rows = 4 if "perm" in recipe.pairing else 3
    results = []
    for count in (6, labelled):
        order = torch.cat((torch.arange(labelled).roll(1), torch.arange(labelled, count)))
        t, x = (v[:count].clone().requires_grad_() for v in (tcam, embeddings))
        loss = D2NetLoss(5, 8, recipe).double()
        for _ in range(2):  # from the second on, x_ref is not zero
            batch = t, x, lengths[:count], labels[:count], order.expand(rows, count)
            result = loss(*batch, logits=logits_for(recipe, t))
        result.total.backward()
        gradients = [torch.zeros_like(v) if v.grad is None else v.grad for v in (t, x)]
        assert all((g[labelled:] == 0).all() for g in gradients)
        results.append([*(v.detach() for v in result), loss.reference, *(g[:labelled] for g in gradients)])
    torch.testing.assert_close(*results)
    assert (results[0][0] != 0) == (labelled > 0)


@pytest.mark.parametrize("recipe", VARIANTS.values(), ids=VARIANTS)
def test_compiles_without_a_break_or_a_look_at_a_value(make_batch, recipe):
    torch._dynamo.reset()
    batch = make_batch(dtype=torch.float32)
    partners = torch.stack([torch.roll(torch.arange(6), i + 1) for i in range(4 if "perm" in recipe.pairing else 3)])
    eager, fused = D2NetLoss(5, 8, recipe), D2NetLoss(5, 8, recipe)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    gradients = []
    for loss in (eager, compiled):
        tcam, embeddings = (x.clone().requires_grad_() for x in batch[:2])
        for _ in range(2):  # from the second on, x_ref is not zero
            logits = logits_for(recipe, tcam)
            result = loss(tcam, embeddings, batch.lengths, batch.labels, partners, logits=logits)
        result.total.backward()
        gradients.append((result.total.detach(), tcam.grad, embeddings.grad))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(eager.reference, fused.reference)
    if recipe in (VARIANTS["paper"], VARIANTS["release"]):
        compiled(*batch)  # drawing the partners


def test_standalone_terms_equal_the_whole(make_batch):
    tcam, embeddings, lengths, labels = make_batch()
    for recipe in (LossRecipe(), load_recipe("thumos14-release").loss):
        rows = (4, 6) if recipe.pairing == "permutation" else (3, 6)
        partners = torch.roll(torch.arange(6), 1).expand(rows)
        loss = D2NetLoss(5, 8, recipe).double()
        result = loss(tcam, embeddings, lengths, labels, partners)
        dis = loss.discriminative(tcam, embeddings, lengths, labels, partners)
        torch.testing.assert_close(dis.loss, result.discriminative)
        both = DenoisingLoss(loss.snippet, loss.video)(tcam, embeddings, lengths, labels, loss.reference)
        torch.testing.assert_close(both, Denoising(result.snippet + result.video, result.snippet, result.video))


def test_terms_that_are_off(make_batch):
    batch = make_batch()
    loss = D2NetLoss(5, 8).double()
    result = loss(*batch, denoise=False)
    assert result.total == result.discriminative > 0
    assert result.snippet == result.video == result.uncertainty == 0
    assert loss.reference.abs().sum() > 0  # x_ref is still updated
    alone = D2NetLoss(5, 8, LossRecipe(alpha_snippet=0, alpha_video=0)).double()(*batch)
    assert alone.total == alone.discriminative and alone.snippet == alone.video == 0


def test_half_precision(make_batch):
    tcam, embeddings, lengths, labels = make_batch(dtype=torch.float32)
    partners = torch.roll(torch.arange(6), 1)
    full = D2NetLoss(5, 8)(tcam, embeddings, lengths, labels, partners)
    half = D2NetLoss(5, 8)(tcam.bfloat16(), embeddings.bfloat16(), lengths, labels, partners)
    assert half.total.dtype == torch.float32
    assert half.discriminative.item() == pytest.approx(full.discriminative.item(), rel=0.02)


def test_unknown_choices_are_refused():
    for change, message in [
        ({"classification": "softmax"}, "loss.classification is 'softmax'; it must be discriminative or focal"),
        ({"denoising": "l2"}, "loss.denoising is 'l2'; it must be pdmi"),
        ({"pairing": "same"}, "pairing is 'same'"),
        ({"embedding_pooling": "max"}, "embedding_pooling is 'max'"),
        ({"video_normalization": "row"}, "normalization is 'row'"),
        ({"snippet_bg_threshold": 0.6}, "no snippet can be both"),
    ]:
        with pytest.raises(InputError, match=message):
            D2NetLoss(5, 8, LossRecipe(**change))


def test_x_ref_is_a_running_mean_in_training_only(make_batch):
    tcam, embeddings, lengths, labels = make_batch(dtype=torch.float32)
    loss = D2NetLoss(5, 8).eval()
    loss(tcam, embeddings, lengths, labels)
    assert (loss.reference == 0).all()
    loss.train()
    loss(tcam, embeddings, lengths, labels)
    first = loss.reference.clone()
    assert first.abs().sum() > 0
    loss(tcam, embeddings, lengths, labels)
    torch.testing.assert_close(loss.reference, first * 1.9)
    assert "reference" in loss.state_dict()


@pytest.mark.parametrize("recipe", VARIANTS.values(), ids=VARIANTS)
def test_inputs_of_any_types(make_batch, recipe):
    tcam, embeddings, lengths, labels = make_batch(dtype=torch.float32)
    partners = torch.stack([torch.roll(torch.arange(6), i + 1) for i in range(4 if "perm" in recipe.pairing else 3)])
    expected = None
    floats = (torch.float32, torch.float64, torch.bfloat16)
    for types in itertools.product(floats, floats, (torch.float32, torch.int64, torch.bool), floats[:2]):
        tcam_dtype, embeddings_dtype, labels_dtype, x_ref_dtype = types
        loss = D2NetLoss(5, 8, recipe).to(x_ref_dtype)
        leaves = [
            x.to(dtype, copy=True).requires_grad_() for x, dtype in ((tcam, tcam_dtype), (embeddings, embeddings_dtype))
        ]
        logits = logits_for(recipe, leaves[0])
        total = loss(*leaves, lengths, labels.to(labels_dtype), partners, logits=logits).total
        total.backward()
        assert all(x.grad is None or x.grad.isfinite().all() for x in leaves)
        expected = total.item() if expected is None else expected
        assert total.item() == pytest.approx(expected, rel=0.1 if torch.bfloat16 in types else 1e-4), types


def test_partners_of_another_integer_type(make_batch):
    tcam, embeddings, lengths, labels = make_batch()
    for partners in (torch.roll(torch.arange(6), 1), torch.stack([torch.roll(torch.arange(6), i) for i in (1, 2, 3)])):
        totals = [
            D2NetLoss(5, 8).double()(tcam, embeddings, lengths, labels, p).total for p in (partners, partners.int())
        ]
        assert totals[0] == totals[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_x_ref_of_a_loss_in_half_precision(make_batch, dtype):
    tcam, embeddings, lengths, labels = make_batch(dtype=torch.float32)
    loss = D2NetLoss(5, 8)
    loss.reference.fill_(1e5)  # beyond the largest float16
    loss = torch.nn.Sequential(loss).to(dtype)[0]
    assert loss.reference.dtype == torch.float32 and (loss.reference == 1e5).all()
    loss(tcam.to(dtype), embeddings.to(dtype), lengths, labels)
    assert loss.reference.isfinite().all() and (loss.reference != 1e5).all()
    assert loss.to("meta").reference.device.type == "meta" and loss.double().reference.dtype == torch.float64
    loss = D2NetLoss(5, 8)
    weight = torch.ones(8, requires_grad=True)
    before = (loss.reference * weight).sum()
    loss(tcam, embeddings, lengths, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()


def test_a_loss_on_another_device_is_named(make_batch):
    tcam, embeddings, lengths, labels = make_batch()
    with pytest.raises(InputError, match="tcam is on cpu but the loss on meta"):
        D2NetLoss(5, 8).to("meta")(tcam, embeddings, lengths, labels)


class _Operations(TorchDispatchMode):
    """The names of the operations that launch something on a device."""

    VIEWS = ("view", "expand", "unsqueeze", "select", "detach", "alias", "squeeze", "empty", "promote_types")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if not name.strip("_").startswith(self.VIEWS):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_it_is_one_operator_each_way(make_batch):
    """Besides it, torch draws the pairs, copies x_ref, and fills in the terms that are off and the gradient of 1."""
    tcam, embeddings, lengths, labels = make_batch()
    leaves = [tcam.requires_grad_(), embeddings.requires_grad_()]
    loss = D2NetLoss(5, 8).double()
    with _Operations() as forward:
        total = loss(*leaves, lengths, labels).total
    with _Operations() as backward:
        torch.autograd.grad(total, leaves)
    assert forward.names.count("d2net_loss") == 1 and len(forward.names) <= 4, forward.names
    assert backward.names.count("d2net_loss_backward") == 1 and len(backward.names) <= 2, backward.names


def test_generator_makes_it_repeatable(make_batch):
    tcam, embeddings, lengths, labels = make_batch()
    totals = [
        D2NetLoss(5, 8).double()(tcam, embeddings, lengths, labels, generator=torch.Generator().manual_seed(s)).total
        for s in (1, 1, 2)
    ]
    assert totals[0] == totals[1] != totals[2]


def test_bottom_up_attention():
    x = torch.tensor([[[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]])
    torch.testing.assert_close(bottom_up_attention(x, torch.tensor([5.0, 0.0])), torch.tensor([[0.0, 1.0, 0.5, 0.5]]))


def test_wrong_shapes_name_what_is_wrong(make_batch):
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
