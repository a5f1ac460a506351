"""Whole localization (Sec. 3.3), from TCAMs and bottom-up attention to detections, of the 212 test videos of THUMOS14.

Lengths as in bench_proposals.py; TCAM and attention are generated. Against the same steps in numpy, one video after the
other, as most repositories of the field have them: top-k class scores, classes above half the best, refinement by
the attention, proposals of 20 thresholds with their contrast, NMS of each class, the score floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from bench_proposals import TEST_LENGTHS, generate, proposals_numpy
from harness import OURS, Case, main

from d2net.localization import Localizer


def localize_numpy(tcams: list[np.ndarray], attentions: list[np.ndarray]) -> list[tuple[int, int, float, float, float]]:
    """Rows (video, class, start, end, score)."""
    rows = []
    for video, (tcam, attention) in enumerate(zip(tcams, attentions, strict=True)):
        k = -(-len(tcam) // 8)
        pooled = np.sort(tcam, axis=0)[-k:].mean(0)
        classes = pooled > 0.5 * pooled.max()
        found = []
        for label, proposals in proposals_numpy(tcam * attention[:, None], classes):
            found += [(video, label, *proposal) for proposal in proposals]
        floor = 0.1 * max((row[4] for row in found), default=0)
        rows += [row for row in found if row[4] > floor]
    return rows


def localize_each(localizer: Localizer, tcams: list[torch.Tensor], attentions: list[torch.Tensor]) -> int:
    """Our localizer, one call a video; the number of proposals."""
    return sum(len(localizer(t, a).score) for t, a in zip(tcams, attentions, strict=True))


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    lengths = TEST_LENGTHS[:4] if quick else TEST_LENGTHS
    tcam = generate(lengths, generator)
    attention = 0.5 + 0.5 * torch.rand(tcam.shape[:2], generator=generator)
    tcams = [tcam[i, :n].contiguous() for i, n in enumerate(lengths)]
    attentions = [attention[i, :n].contiguous() for i, n in enumerate(lengths)]
    localizer = Localizer.from_recipe("thumos14-paper")
    batch = tcam.to(device), attention.to(device), torch.tensor(lengths, device=device)

    numpy_run = partial(localize_numpy, [t.numpy() for t in tcams], [a.numpy() for a in attentions])
    ours, theirs = len(localizer(*batch).score), len(numpy_run())
    if abs(ours - theirs) > 0.01 * theirs:
        raise SystemExit(f"the contenders find different numbers of proposals: {ours} and {theirs}")
    contenders = {OURS: partial(localizer, *batch)}
    on_device = [t.to(device) for t in tcams], [a.to(device) for a in attentions]
    contenders["d2net, a call per video"] = partial(localize_each, localizer, *on_device)
    if device.type == "cpu":
        contenders["numpy"] = numpy_run
    snippets = sum(lengths)
    yield Case(
        f"{len(lengths)} videos, {snippets} snippets, 20 classes",
        contenders,
        bytes=4 * snippets * (20 + 1),
        once=frozenset({"numpy"}),
    )


if __name__ == "__main__":
    main("localization", cases, __doc__)
