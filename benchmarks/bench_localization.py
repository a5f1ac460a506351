"""Whole localization (Sec. 3.3), from TCAMs and bottom-up attention to detections, of the 212 test videos of THUMOS14.

Lengths as in bench_proposals.py; TCAM and attention are generated. Against the same steps in numpy, one video after the
other, as most repositories of the field have them: top-k class scores, classes above half the best, refinement by
the attention, proposals of 20 thresholds with their contrast, NMS of each class, the score floor.

Then with the network: `localize` of a data set, which packs short recordings, against one recording after the other.
Features and weights are random. 40 recordings of the demo's network and lengths, 200 of the paper's network.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from bench_proposals import TEST_LENGTHS, generate, proposals_numpy
from harness import OURS, Case, main

from d2net.data.dataset import Dataset, Recording
from d2net.detections import Detections
from d2net.localization import Localizer, localize, of_dataset, predict, propose
from d2net.model import D2Net
from d2net.recipes import load_recipe


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


def one_at_a_time(model: D2Net, dataset: Dataset, localizer: Localizer) -> Detections:
    found = [propose(localizer, r, *predict(model, dataset.features(i))) for i, r in enumerate(dataset.recordings)]
    return of_dataset(found, dataset, dataset.classes)


def with_network(
    name: str, recipe_name: str, width: int, lengths: list[int], classes: int, device: torch.device
) -> Case:
    generator, recipe = torch.Generator().manual_seed(0), load_recipe(recipe_name)
    model = D2Net(classes, (width, width), recipe.model).to(device).order_weights()  # as load_model gives it
    model.x_ref.copy_(torch.randn(model.embedding_dim, generator=generator))
    features = [torch.randn(n, 2 * width, generator=generator).numpy() for n in lengths]
    recordings = tuple(Recording(str(i), "test", (), (), 1.0, "memory", lambda x=x: x) for i, x in enumerate(features))
    dataset = Dataset("random", tuple(map(str, range(classes))), (width, width), recordings)
    contenders = {
        OURS: partial(localize, model, dataset, recipe.localization),
        "d2net, a recording at a time": partial(one_at_a_time, model, dataset, Localizer(recipe.localization)),
    }
    weights = sum(p.numel() for p in model.parameters())
    snippets = sum(lengths)
    return Case(name, contenders, bytes=4 * (2 * width * snippets + weights), operations=2 * weights * snippets)


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

    def drawn(count: int, least: int, most: int) -> list[int]:
        return torch.randint(least, most + 1, (4 if quick else count,), generator=generator).tolist()

    of_demo, of_paper = drawn(40, 180, 600), drawn(200, 20, 600)
    yield with_network(
        f"network, {len(of_demo)} recordings, {sum(of_demo)} snippets, 2 x 48", "watch", 48, of_demo, 5, device
    )
    yield with_network(
        f"network, {len(of_paper)} recordings, {sum(of_paper)} snippets, 2 x 1024",
        "thumos14-paper",
        1024,
        of_paper,
        20,
        device,
    )


if __name__ == "__main__":
    main("localization", cases, __doc__)
