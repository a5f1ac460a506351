"""docs/packed.md: its example runs, and gives what the padded batch gives."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch

from d2net import losses, ops
from d2net.losses import D2NetLoss
from d2net.ops.temporal_conv import convolution

PAGE = (Path(__file__).parents[1] / "docs" / "packed.md").read_text(encoding="utf-8")


def test_the_example_is_the_padded_batch():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(example, "docs/packed.md", "exec"), names)
    model, out, lengths = names["model"], names["out"], names["lengths"]
    assert names["offsets"].tolist() == [0, 120, 170, 177]
    assert (out.tcam.shape, out.embeddings.shape, names["second"].shape) == ((177, 20), (177, 1024), (50, 20))

    padded = torch.nn.utils.rnn.pad_sequence(names["recordings"], batch_first=True)
    loss = D2NetLoss.from_recipe("thumos14-paper", num_classes=20, embedding_dim=1024)
    found = model(padded, lengths)
    total = loss(found.tcam, found.embeddings, lengths, names["labels"]).total
    torch.testing.assert_close(total, names["result"].total)
    torch.testing.assert_close(found.tcam[1, :50], names["second"])
    weights = list(model.parameters())
    for gradient, weight in zip(torch.autograd.grad(total, weights), weights, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_who_takes_offsets():
    named = re.search(r"^`topk_pool`.*?take `offsets`", PAGE, re.DOTALL | re.MULTILINE)[0]
    assert "every loss" in named
    for module in (ops, losses):
        for name in module.__all__:
            function = getattr(module, name)
            function = getattr(function, "forward", function)
            arguments = inspect.signature(function).parameters
            of_rows = module is losses or name in named
            assert ("offsets" in arguments) == ("lengths" in arguments and of_rows), name


def test_the_drawing_of_the_products():
    """Which rows each matrix has, and which rows of the result come of it."""
    (drawn,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    k, n = 3, 8
    x, covered = torch.zeros(n, 1, dtype=torch.float64), []
    for line in drawn.splitlines()[1:]:
        stretches = [[int(r) for r in s.split()] for s in re.search(r"\[(.*)\]", line)[1].split("|")]
        rows = [int(r) for r in re.findall(r"\d+", line.split("gives")[1])]
        for stretch, row in zip(stretches, rows, strict=True):
            y = x.clone()
            y[stretch] = 1.0
            weight = torch.ones(1, k, 1, dtype=torch.float64)
            assert convolution(y, weight, 1)[row] == k
            covered.append(row)
    assert sorted(covered) == list(range(1, n - 1))
