"""``d2net study condition-number``: its matrices are those of the loss, its correlation is right, its files whole."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from typer.testing import CliRunner

from d2net.cli import app
from d2net.data import simulate
from d2net.errors import InputError
from d2net.losses import SnippetDenoising, VideoDenoising
from d2net.ops import log_condition_number
from d2net.recipes import load_recipe
from d2net.studies.condition_number import (
    draw,
    joint_matrices,
    measure,
    sample_points,
    spearman,
    summarise,
    training_points,
    write_study,
)
from d2net.training import Trainer

SMALL = ["training.batch_size=3", "training.max_snippets=60", "model.embedding_dim=8"]


pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object, code: int = 0):
    command = ["study", "condition-number", *map(str, arguments)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "120", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*arguments: object) -> str:
    lines = run(*arguments, code=2).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_measures_agree_with_the_operator_and_with_det() -> None:
    u = np.random.default_rng(0).random((50, 3, 3))
    points = measure(u)
    np.testing.assert_allclose(points.log_condition, log_condition_number(torch.from_numpy(u)).numpy(), rtol=1e-9)
    np.testing.assert_allclose(points.log_determinant, np.log(np.abs(np.linalg.det(u))), rtol=1e-9)
    assert points.full_rank.all()


def test_known_and_singular_matrices() -> None:
    points = measure(np.array([np.eye(2) / 2, [[0.4, 0], [0, 0.1]], [[0.25, 0.25], [0.25, 0.25]], np.zeros((2, 2))]))
    np.testing.assert_allclose(points.log_condition, [0, math.log(4), 0, 0], atol=1e-12)
    np.testing.assert_allclose(points.log_determinant[:2], np.log([0.25, 0.04]))
    assert points.rank.tolist() == [2, 2, 1, 0] and points.full_rank.tolist() == [True, True, False, False]
    assert summarise({"random": points})["random"] == {"classes": 2, "matrices": 4, "singular": 2, "spearman": -1.0}


def test_determinants_too_small_for_a_float_are_kept() -> None:
    points = measure(np.eye(200)[None] * 1e-4)
    assert points.full_rank.all() and points.log_determinant[0] == pytest.approx(200 * math.log(1e-4))


def test_spearman() -> None:
    assert spearman(np.array([1.0, 2, 3, 10]), np.array([9.0, 7, 5, -100])) == pytest.approx(-1)
    # Tied values share their mean rank: ranks (1, 2.5, 2.5, 4) and (1, 3, 2, 4) by hand.
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 5, 4, 6])) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(np.array([1.0]), np.array([1.0])) is None
    assert spearman(np.ones(3), np.arange(3.0)) is None


@pytest.mark.parametrize("classes", [2, 5])
def test_random_matrices(classes: int) -> None:
    done = []
    points = sample_points(300, classes, seed=3, progress=lambda i, n: done.append((i, n)))
    again = sample_points(300, classes, seed=3)
    np.testing.assert_array_equal(points.log_condition, again.log_condition)
    assert len(points) == 300 and done[-1] == (300, 300)
    # Entries that sum to 1: no determinant exceeds that of the identity over C.
    assert points.log_determinant.max() <= -classes * math.log(classes) + 1e-9
    rho = spearman(points.log_condition, points.log_determinant)
    assert rho is not None and rho < -0.6


def test_matrices_are_those_of_the_loss() -> None:
    torch.manual_seed(0)
    tcam, embeddings = torch.rand(4, 20, 3, dtype=torch.float64), torch.randn(4, 20, 6, dtype=torch.float64)
    lengths, x_ref = torch.tensor([20, 13, 0, 7]), torch.randn(6, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]], dtype=torch.float64)
    embeddings[3] = -x_ref  # all foreground: no U_1
    u = joint_matrices(tcam, embeddings, lengths, labels, x_ref, topk_divisor=8)
    assert u["snippet"].shape == (2, 2, 2) and u["video"].shape == (1, 3, 3)
    torch.testing.assert_close(u["snippet"].sum((1, 2)), torch.ones(2, dtype=torch.float64))
    snippet = torch.from_numpy(measure(u["snippet"].numpy()).log_condition).mean()
    torch.testing.assert_close(snippet, SnippetDenoising()(tcam, embeddings, lengths, x_ref))
    present = [0, 1, 3]  # the loss leaves the empty recording out of n; the condition number knows no scale
    video = measure(u["video"].numpy()).log_condition[0]
    expected = VideoDenoising()(tcam[present], lengths[present], labels[present])
    assert video == pytest.approx(float(expected))


def test_training_is_watched_and_not_changed(tmp_path: Path) -> None:
    dataset = simulate(stream_widths=(8, 8)).subset("train")
    recipe = load_recipe("watch").override([*SMALL, "training.iterations=12", "training.learning_rate=0.02"])
    watched = Trainer(dataset, recipe, out=tmp_path / "a", tensorboard=False)
    points = training_points(watched)
    assert len(points["video"]) == 12 and points["video"].classes == 4
    assert 0 < len(points["snippet"]) <= 36 and points["snippet"].classes == 2
    alone = Trainer(dataset, recipe, out=tmp_path / "b", tensorboard=False)
    alone.run()
    assert not watched.loss._forward_hooks
    for a, b in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_command_writes_figure_points_and_summary(tmp_path: Path) -> None:
    out = tmp_path / "fig3"
    settings = [a for s in SMALL for a in ("--set", s)]
    text = run("--out", out, "--samples", 50, "--data", "simulated", "--iterations", 2, *settings).stdout
    assert "random" in text and "video" in text
    summary = json.loads((out / "summary.json").read_text())
    assert summary["dataset"].startswith("simulated") and summary["iterations"] == 2
    assert summary["results"]["random"]["matrices"] == 50 and summary["results"]["video"]["classes"] == 4
    with open(out / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(r["matrices"] for r in summary["results"].values())
    chosen = [r for r in rows if r["kind"] == "random" and r["rank"] == "2"]
    rho = spearman(*(np.array([float(r[k]) for r in chosen]) for k in ("log_condition_number", "log_abs_determinant")))
    assert rho == pytest.approx(summary["results"]["random"]["spearman"], abs=1e-6)
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG") and (out / "figure.pdf").stat().st_size > 1000

    # The recipe of that run, again; and random matrices alone, over the earlier files.
    run("--out", tmp_path / "b", "--samples", 9, "--data", "simulated", "--iterations", 1,
        "--checkpoint-run", out / "training")  # fmt: skip
    saved = json.loads((tmp_path / "b" / "training" / "checkpoint.json").read_text())
    assert saved["recipe"]["model"]["embedding_dim"] == 8 and saved["recipe"]["training"]["batch_size"] == 3
    run("--out", out, "--samples", 9, "--classes", 3, "--iterations", 0)
    assert list(json.loads((out / "summary.json").read_text())["results"]) == ["random"]


def test_a_training_without_pseudo_background_still_draws(tmp_path: Path) -> None:
    points = {"random": sample_points(20, 2), "video": measure(np.full((3, 4, 4), 0.01))}
    write_study(tmp_path, points, {}, "tiny")
    assert json.loads((tmp_path / "summary.json").read_text())["results"]["video"]["spearman"] is None


@pytest.mark.parametrize("name", ["tiny", "a$b_c$", "x" * 80, "two\nlines"])
def test_nothing_hides_a_point_or_leaves_the_figure(name: str) -> None:
    points = {"random": sample_points(300, 2), "snippet": sample_points(30, 2, 1), "video": sample_points(30, 5, 2)}
    figure = draw(points, name)
    figure.draw_without_rendering()
    assert figure.axes[1].get_title(loc="left").startswith(f"U met in training on {' '.join(name.split())[:4]}")
    for ax in figure.axes:
        legend = ax.get_legend()
        for cloud in ax.collections:
            y = ax.transData.transform(np.asarray(cloud.get_offsets()))[:, 1]
            assert y.max() < legend.get_window_extent().y0
    title = next(t for t in figure.findobj(Text) if t.get_text().startswith("U met"))
    assert title.get_window_extent().x1 <= figure.bbox.x1 and "\n" not in title.get_text()


def test_errors_are_one_line(tmp_path: Path) -> None:
    out, missing = ["--out", tmp_path / "out"], tmp_path / "missing"
    assert "no samples" in fails(*out, "--iterations", 0, "--samples", 0)
    assert "no samples" in fails(*out, "--iterations", 0, "--samples", -3)
    assert "at least 2 classes" in fails(*out, "--iterations", 0, "--classes", 1)
    assert "no samples" in fails(*out, "--data", "simulated", "--samples", 0)
    assert not (tmp_path / "out").exists()
    assert str(missing) in fails(*out, "--data", missing)
    assert "unknown recipe" in fails(*out, "--data", "simulated", "--recipe", "no")
    assert str(missing) in fails(*out, "--data", "simulated", "--checkpoint-run", missing)
    assert "leave --checkpoint-run" in fails(*out, "--iterations", 0, "--set", "model.dropout=0")
    assert "there is no subset 'val'" in fails(*out, "--data", "simulated", "--subset", "val")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails("--out", tmp_path / "file", "--iterations", 0, "--samples", 5)
    with pytest.raises(InputError):
        sample_points(1, 2)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert str(tmp_path) in fails("--out", tmp_path / "out", "--iterations", 0, "--samples", 5)


def test_help_has_examples() -> None:
    assert "\n   d2net study condition-number --out" in run("--help").stdout
