"""The whole loss L_Dis + L_D (Eq. 1), forward and backward, against loops over recordings as research code has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from harness import OURS, Case, main
from torch import Tensor
from torch.nn import functional as F

from d2net.losses import D2NetLoss
from d2net.ops import use_backend
from d2net.recipes import load_recipe


def loops(
    tcam: Tensor, embeddings: Tensor, lengths: list[int], labels: Tensor, x_ref: Tensor, partners: list[int]
) -> tuple[Tensor, Tensor]:
    """The paper's loss with one recording after the other, without d2net: what a training script would hold.

    Returns the loss and the new x_ref.
    """
    count, recipe = len(lengths), load_recipe("thumos14-paper").loss
    scores, foreground, background, attentions = [], [], [], []
    for b in range(count):
        t = tcam[b, : lengths[b]]
        scores.append(t.topk(max(1, -(-len(t) // 8)), dim=0)[0].mean(0))
        attention = t.max(1)[0]
        attentions.append(attention)
        fg = torch.where(attention > 0.5, attention, torch.zeros_like(attention))
        bg = torch.where(1 - attention > 0.5, 1 - attention, torch.zeros_like(attention))
        x = embeddings[b, : lengths[b]]
        foreground.append((fg[:, None] * x).sum(0) if fg.sum() > 0 else None)
        background.append((bg[:, None] * x).sum(0) if bg.sum() > 0 else None)

    total = tcam.new_zeros(())
    for b, other in enumerate(partners):
        w_fb = w_fg = w_bg = tcam.new_zeros(())
        if foreground[b] is not None and background[other] is not None:
            w_fb = F.cosine_similarity(foreground[b], background[other], dim=0).clamp(min=0)
        if foreground[b] is not None and foreground[other] is not None:
            w_fg = recipe.gamma * (1 - F.cosine_similarity(foreground[b], foreground[other], dim=0))
        if background[b] is not None and background[other] is not None:
            w_bg = recipe.gamma * (1 - F.cosine_similarity(background[b], background[other], dim=0))
        p = scores[b].clamp(1e-6, 1 - 1e-6)
        positive = -((1 - p + w_fg + w_fb) ** 2) * p.log()
        negative = -((p + w_bg + w_fb) ** 2) * (1 - p).log()
        total = total + torch.where(labels[b] > 0, positive, negative).sum() / count

    with torch.no_grad():
        present = [x for x in background if x is not None]
        if present:
            x_ref = 0.9 * x_ref + 0.1 * torch.stack(present).mean(0)

    terms = []
    for b in range(count):
        x, attention = embeddings[b, : lengths[b]].detach(), attentions[b]
        score = 0.5 * (1 - F.cosine_similarity(x, x_ref[None], dim=1))
        fg, bg = score > 0.5, score < 0.5
        if fg.sum() > 0 and bg.sum() > 0:
            y = torch.stack((fg, bg), 1).to(x.dtype) / (fg.sum() + bg.sum())
            terms.append(log_condition_number(torch.stack((attention, 1 - attention)) @ y))
    snippet = torch.stack(terms).mean() if terms else tcam.new_zeros(())
    p = torch.stack(scores).clamp(1e-6, 1 - 1e-6)
    video = log_condition_number(p.T @ (labels / count))
    return total + recipe.alpha_snippet * snippet + recipe.alpha_video * video, x_ref


def log_condition_number(u: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(u)
    sigma = sigma[sigma > 1e-5]
    return (sigma[0] / sigma[-1]).log() if len(sigma) > 1 else u.sum() * 0


def batch(b: int, t: int, c: int, d: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TCAM, embeddings, lengths and labels (one or two classes a recording), generated."""
    generator = torch.Generator().manual_seed(0)
    tcam = torch.rand(b, t, c, generator=generator) ** 3
    embeddings = torch.randn(b, t, d, generator=generator)
    lengths = torch.randint(t // 2, t + 1, (b,), generator=generator)
    lengths[0] = t
    labels = torch.zeros(b, c)
    for row in labels:
        row[torch.randperm(c, generator=generator)[: int(torch.randint(1, 3, (), generator=generator))]] = 1
    return tcam.to(device), embeddings.to(device), lengths.to(device), labels.to(device)


def forward_backward(loss: Callable[..., Tensor], tcam: Tensor, embeddings: Tensor) -> Callable[[], Tensor]:
    leaves = [x.clone().requires_grad_() for x in (tcam, embeddings)]

    def run() -> Tensor:
        value = loss(*leaves)
        torch.autograd.grad(value, leaves)
        return value.detach()

    return run


def in_plain_pytorch(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``run`` with the operators' references, as on a device without kernels: the batched PyTorch formulation."""

    def changed() -> Tensor:
        with use_backend("reference"):
            return run()

    return changed


def in_one_thread(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``run`` with its backward in the calling thread; autograd hands it to one of the GPU's otherwise."""

    def changed() -> Tensor:
        with torch.autograd.set_multithreading_enabled(False):
            return run()

    return changed


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = [(10, 750, 20, 1024), (10, 750, 100, 1024), (20, 750, 20, 1024), (10, 3000, 20, 1024), (10, 200, 5, 64)]
    shapes += [(2, t, 20, 64) for t in (100, 1000, 10_000, 100_000)]
    for b, t, c, d in [(10, 100, 20, 64)] if quick else shapes:
        tcam, embeddings, lengths, labels = batch(b, t, c, d, device)
        x_ref = torch.randn(d, generator=torch.Generator().manual_seed(1)).to(device)
        partners = torch.arange(b, device=device).roll(1)
        module = D2NetLoss.from_recipe("thumos14-paper", num_classes=c, embedding_dim=d).to(device)

        def ours(tcam: Tensor, embeddings: Tensor, args=(module, x_ref, lengths, labels, partners)) -> Tensor:
            module, x_ref, lengths, labels, partners = args
            module.reference.copy_(x_ref)  # every call updates it
            return module(tcam, embeddings, lengths, labels, partners).total

        def by_loops(tcam: Tensor, embeddings: Tensor, args=(lengths, labels, x_ref, partners)) -> Tensor:
            lengths, labels, x_ref, partners = args
            return loops(tcam, embeddings, lengths.tolist(), labels, x_ref, partners.tolist())[0]

        run = forward_backward(ours, tcam, embeddings)
        contenders = {
            OURS: run,
            "loops over recordings": forward_backward(by_loops, tcam, embeddings),
            "PyTorch, batched": in_plain_pytorch(forward_backward(ours, tcam, embeddings)),
        }
        if device.type == "cuda":
            for name in (OURS, "PyTorch, batched"):
                contenders[f"{name}, autograd in one thread"] = in_one_thread(contenders[name])
        values = {name: float(contender()) for name, contender in contenders.items()}
        if max(values.values()) - min(values.values()) > 1e-3 * abs(values[OURS]):
            raise SystemExit(f"the contenders do not compute the same loss: {values}")
        snippets = int(lengths.sum())
        yield Case(
            f"B={b} T={t} C={c} D={d}",
            contenders,
            # Embeddings: read twice forward (Eq. 2; Eq. 8 with the updated x_ref) and once backward, and their
            # gradient written; the TCAM read once and its gradient written.
            bytes=4 * (3 * snippets * d + b * t * d + 2 * b * t * c),
            size=t if (b, d) == (2, 64) else None,
        )


if __name__ == "__main__":
    main("loss", cases, __doc__)
