"""Every number of the paper and of the released code that a recipe can set, against the recipes.

The quotes are the paper's words, as its text has them; a test looks them up there.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import pytest
import torch

from d2net import equations, losses, ops
from d2net.data import simulate
from d2net.losses import D2NetLoss
from d2net.model import D2Net
from d2net.ops.loss_ref import LossSettings
from d2net.recipes import differences, load_recipe
from d2net.recipes.recipe import SECTIONS
from d2net.report.paper_tables import load_table
from d2net.training import Trainer
from d2net.training.adam import Adam

BOTH = ("thumos14-paper", "activitynet12-paper")
THUMOS14, ACTIVITYNET12 = (BOTH[0],), (BOTH[1],)
THRESHOLDS = [round(0.025 * i, 3) for i in range(1, 21)]

# (the paper's words, recipes, settings and their values)
PAPER = [
    # Sec. 4, "Implementation details"
    ("are: (3, 1) for THUMOS14", THUMOS14, {"model.kernel_size": 3, "model.dilation": 1}),
    ("and (5, 2) for ActivityNet1.2", ACTIVITYNET12, {"model.kernel_size": 5, "model.dilation": 2}),
    (
        "kernel size and dilation rate of the temporal convolutional layers",
        BOTH,
        {"model.classifier_kernel_size": None},
    ),
    ("is trained with a mini-batch size of 10", BOTH, {"training.batch_size": 10}),
    ("for 20K iterations", BOTH, {"training.iterations": 20_000}),
    ("with a 10^{-4} learning rate", BOTH, {"training.learning_rate": 1e-4}),
    ("and 0.005 weight decay", BOTH, {"training.weight_decay": 0.005}),
    (
        r"The k for top-k is set to \lceil s/8 \rceil",
        BOTH,
        {"loss.topk_divisor": 8, "localization.topk_divisor": 8, "localization.topk_rounding": "ceil"},
    ),
    (
        "The balancing parameter α is set to 0.2 and 10^{-3} for THUMOS14 and ActivityNet1.2",
        THUMOS14,
        {"loss.alpha_snippet": 0.2, "loss.alpha_video": 0.2},
    ),
    (
        "The balancing parameter α is set to 0.2 and 10^{-3} for THUMOS14 and ActivityNet1.2",
        ACTIVITYNET12,
        {"loss.alpha_snippet": 1e-3, "loss.alpha_video": 1e-3},
    ),
    (
        "weight γ and focusing parameter β are set to 0.01 and 2 for both datasets",
        BOTH,
        {"loss.gamma": 0.01, "loss.beta": 2.0},
    ),
    (
        "Multiple thresholds from 0.025 to 0.5 with increments of 0.025",
        BOTH,
        {"localization.thresholds": THRESHOLDS},
    ),
    ("The NMS threshold is set to 0.5", BOTH, {"localization.nms_iou": 0.5}),
    (
        "for retaining detections in a video is set to 10% of the maximum proposal score in that video",
        BOTH,
        {"localization.score_floor": 0.1, "localization.score_floor_scope": "recording"},
    ),
    (
        "at different IoU thresholds ([0.5, 0.95] in steps of 0.05)",
        ACTIVITYNET12,
        {"evaluation.tiou": [round(0.5 + 0.05 * i, 2) for i in range(10)]},
    ),
    # Sec. 3.1
    (r"to obtain d=2048 dimensional features", BOTH, {"model.embedding_dim": None}),
    (r"latent discriminative embeddings \mathbf{x}(t) \in \mathbb{R}^{d/2}", BOTH, {"model.embedding_dim": None}),
    (
        r"where \tau = 0.5 and",
        BOTH,
        {"loss.threshold": 0.5, "loss.background_threshold": 0.5, "loss.threshold_inclusive": False},
    ),
    (r"\mathbf{x}_{fg} = \sum_{\boldsymbol{\lambda}(t) > \tau}", BOTH, {"loss.embedding_pooling": "sum"}),
    ("denote embeddings from different videos in a mini-batch", BOTH, {"loss.pairing": "different"}),
    (
        r"\mathcal{L}_{Dis} = -\sum_{c: \mathbf{y}[c]=1} (1 - \mathbf{p}[c] + w_{fg} + w_{fb})^{\beta}",
        BOTH,
        {"loss.classification": "discriminative", "loss.class_reduction": "sum", "loss.balance_classes": False},
    ),
    # Sec. 3.2
    (r"our \mathcal{L}_{pdmi} at two levels", BOTH, {"loss.denoising": "pdmi"}),
    (r"= 0.9\mathbf{x}_{ref}^{[m-1]} + 0.1\mathbf{x}_{bg}^{\mu,[m]}", BOTH, {"loss.momentum": 0.9}),
    ("denotes the mean of the background embeddings in a mini-batch", BOTH, {"loss.reference_update": "background"}),
    (r"t_f = \{t: \lambda'(t) > 0.5\}", BOTH, {"loss.snippet_fg_threshold": 0.5}),
    (r"t_b = \{t: \lambda'(t) < 0.5\}", BOTH, {"loss.snippet_bg_threshold": 0.5}),
    (r"is constructed using top-down attention \lambda(t), t \in t_f", BOTH, {"loss.snippet_own_classes": False}),
    (r"\mathbf{Y}_{1} = \frac{1}{z}", BOTH, {"loss.snippet_normalization": "joint"}),
    (r"\mathbf{P}_2 = \begin{bmatrix} \mathbf{p}_1, \dots, \mathbf{p}_n", BOTH, {"loss.video_peak_share": None}),
    (r"\mathbf{Y}_2 = \frac{1}{n}", BOTH, {"loss.video_normalization": "joint"}),
    # Sec. 3.3
    ("to obtain the predicted class probabilities", BOTH, {"localization.class_scores": "tcam"}),
    (
        r"above a threshold p_{th} = 0.5 \max(\mathbf{p})",
        BOTH,
        {
            "localization.class_rule": "relative",
            "localization.class_threshold": 0.5,
            "localization.class_threshold_high": None,
            "localization.max_classes": None,
        },
    ),
    (
        r"to obtain a refined sequence \mathbf{r}_c = \lambda' \mathbf{T}_c",
        BOTH,
        {"localization.attention": True, "localization.attention_peak": None},
    ),
    (
        "denote the mean activation of the proposal and its neighboring background",
        BOTH,
        {"localization.outer": "pooled"},
    ),
    (
        "by inflating the proposal on either side by 25%of its width",
        BOTH,
        {"localization.inflation": 0.25},
    ),
]
# What the paper does not name: the value that changes nothing, or what docs/fidelity.md says was chosen. A new setting
# goes here, or above with the paper's words.
UNSAID = {
    "model.standardize": False,
    "model.residual": False,
    "model.dropout": 0.0,
    "model.dropout_embeddings": False,
    "model.weight_std": None,
    "loss.min_snippets": 1,
    "loss.skip_unlabelled": False,
    "loss.probability_floor": 1e-6,
    "loss.snippet_entry_floor": 0.0,
    "loss.snippet_rank_tol": 1e-5,
    "loss.snippet_oriented": False,
    "loss.video_queue": 0,
    "loss.um_weight": 0.0,
    "loss.um_magnitude": 5e-4,
    "loss.um_margin_unit": "absolute",
    "loss.um_margin": 100.0,
    "training.ema_decay": 0.0,
    "training.max_snippets": 750,
    "training.denoising_start": 0,
    "training.denoising_every": 1,
    "training.denoising_agreement": None,
    "localization.min_length": 1,
    "localization.min_contrast": None,
    "evaluation.protocol": "activitynet",
}
# What the released code sets otherwise: (thumos14-release, activitynet12-release).
RELEASED = {
    "training.batch_size": (20, 20),
    "training.weight_decay": (0.0005, 0.0005),
    "loss.alpha_snippet": (0.1, 0.1),
    "loss.alpha_video": (0.1, 0.1),
    "training.denoising_start": (1001, 1001),  # after iteration 1000, counted from 0
    "training.denoising_every": (2, 2),
    "model.residual": (True, True),
    "model.dropout": (0.7, 0.7),
    "model.dropout_embeddings": (True, True),
    "model.classifier_kernel_size": (1, None),
    "model.weight_std": (0.01, 0.01),
    "loss.embedding_pooling": ("mean", "mean"),
    "loss.threshold_inclusive": (True, True),
    "loss.background_threshold": (0.5, 0.8),
    "loss.pairing": ("permutation", "permutation"),
    "loss.reference_update": ("lowest_attention", "lowest_attention"),
    "loss.topk_divisor": (8, 4),
    "loss.class_reduction": ("mean", "mean"),
    "loss.balance_classes": (True, True),
    "loss.probability_floor": (1e-3, 1e-3),
    "loss.min_snippets": (5, 5),
    "loss.skip_unlabelled": (True, True),
    "loss.snippet_own_classes": (True, True),
    "loss.snippet_normalization": ("per_class", "per_class"),
    "loss.snippet_entry_floor": (1e-10, 1e-10),
    "loss.snippet_rank_tol": (0.0, 0.0),
    "loss.snippet_bg_threshold": (0.5, 0.3),
    "loss.video_peak_share": (0.2, 0.2),
    "loss.video_normalization": ("per_class", "per_class"),
    "localization.class_scores": ("refined", "refined"),
    "localization.topk_divisor": (8, 4),
    "localization.topk_rounding": ("floor", "floor"),
    "localization.class_rule": ("relative", "absolute"),
    "localization.class_threshold": (0.5, 0.5),
    "localization.class_threshold_high": (None, 1.0),
    "localization.max_classes": (None, 2),
    "localization.attention_peak": (None, 2.0),
    "localization.thresholds": (THRESHOLDS[:-1], THRESHOLDS[:-1]),
    "localization.min_length": (2, 2),
    "localization.nms_iou": (0.3, 0.3),
    "localization.outer": ("mean_of_sides", "mean_of_sides"),
    "localization.min_contrast": (-0.4, -0.4),
    "localization.score_floor_scope": ("class", "class"),
    "evaluation.protocol": ("wtalc", "wtalc"),
    "evaluation.tiou": ([0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]),
}


def value(recipe: str, setting: str) -> object:
    section, key = setting.split(".")
    return load_recipe(recipe).to_dict()[section][key]


@pytest.mark.parametrize(("words", "recipes", "settings"), PAPER, ids=[words[:40] for words, _, _ in PAPER])
def test_paper_values(words, recipes, settings):
    for recipe in recipes:
        for setting, expected in settings.items():
            assert value(recipe, setting) == expected, (recipe, setting, words)


@pytest.mark.parametrize("recipe", BOTH)
def test_no_setting_is_without_a_source(recipe):
    """A setting has the paper's words above, or is one that the paper does not name."""
    said = {setting for _, recipes, settings in PAPER if recipe in recipes for setting in settings}
    said |= {"evaluation.tiou"} if recipe == "thumos14-paper" else set()  # test_table_1_is_part_of_the_evaluation
    settings = {f"{section}.{f.name}" for section, made in SECTIONS.items() for f in fields(made)}
    assert said | set(UNSAID) == settings and not said & set(UNSAID)
    assert {setting: value(recipe, setting) for setting in UNSAID} == UNSAID


def test_table_1_is_part_of_the_evaluation():
    table = load_table("thumos14")
    assert table.tiou[:5] == (0.1, 0.2, 0.3, 0.4, 0.5)  # the paper's; later methods are compared to 0.7
    assert all(level is None for row in table.rows for level in row.map[5:])
    assert value("thumos14-paper", "evaluation.tiou") == [*table.tiou]
    # "test videos from 20 action categories"; "annotations of 100 categories"
    assert (table.classes, load_table("activitynet12").classes) == (20, 100)


def test_the_words_are_the_papers(shared):
    def plain(text: str) -> str:
        return re.sub(r"[\s$]+", "", text)

    paper = plain((shared / "paper" / "d2net.txt").read_text(encoding="utf-8"))
    assert not [words for words, _, _ in PAPER if plain(words) not in paper]
    assert plain("followed by a leaky ReLU with 0.2 negative slope") in paper
    assert plain("using the Adam [9] optimizer") in paper


@pytest.mark.parametrize("recipe", BOTH)
def test_paper_values_that_are_no_settings(recipe, tmp_path):
    """Sec. 3: 2048-d features of two streams, three layers, x(t) in R^{d/2}, snippets of 16 frames. Sec. 4: leaky ReLU
    "with 0.2 negative slope" after the first two convolutions, Adam."""
    settings = load_recipe(recipe)
    model = D2Net(20, recipe=settings.model)
    assert model.stream_widths == (1024, 1024)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv1d)]
    assert len(convolutions) == 2 * 3
    assert all(c.kernel_size == (settings.model.kernel_size,) for c in convolutions)
    assert model.settings.dilation == settings.model.dilation
    assert D2NetLoss.from_recipe(recipe, num_classes=20, embedding_dim=1024).reference.shape == (1024,)
    torch.manual_seed(0)
    one_stream = D2Net(20, (8,), settings.model).eval()
    x = torch.randn(1, 9, 8)
    y, dilation = x.mT, settings.model.dilation
    for layer in [m for m in one_stream.modules() if isinstance(m, torch.nn.Conv1d)][:2]:
        padding = settings.model.kernel_size // 2 * dilation
        y = torch.nn.functional.conv1d(y, layer.weight, layer.bias, padding=padding, dilation=dilation)
        y = torch.where(y > 0, y, 0.2 * y)
    torch.testing.assert_close(one_stream(x).embeddings, y.mT)
    small = settings.override(["model.embedding_dim=4", "training.max_snippets=8"])
    trainer = Trainer(simulate(stream_widths=(4, 4)).subset("train"), small, out=tmp_path, device="cpu")
    optimizer = trainer.state.optimizer
    assert type(optimizer) is Adam and (optimizer.lr, optimizer.weight_decay) == (1e-4, 0.005)


@pytest.mark.parametrize("place", [0, 1], ids=["thumos14", "activitynet12"])
def test_release_values(place):
    recipe = ("thumos14-release", "activitynet12-release")[place]
    expected = {setting: values[place] for setting, values in RELEASED.items()}
    assert {setting: value(recipe, setting) for setting in RELEASED} == expected
    # and nothing else
    differing = {setting for setting, _ in differences([load_recipe(BOTH[place]), load_recipe(recipe)])}
    assert differing <= set(RELEASED)
    paper = {setting: value(BOTH[place], setting) for setting in RELEASED}
    assert differing == {setting for setting in RELEASED if paper[setting] != expected[setting]}


# (function or class, its argument, the setting that has the same default)
DEFAULTS = [
    (equations.class_scores, "divisor", "loss.topk_divisor"),
    (equations.foreground_and_background, "tau", "loss.threshold"),
    (equations.separation_weights, "gamma", "loss.gamma"),
    (equations.discriminative_loss, "beta", "loss.beta"),
    (equations.pdmi_loss, "rank_tol", "loss.snippet_rank_tol"),
    (equations.update_x_ref, "momentum", "loss.momentum"),
    (equations.total_loss, "alpha", "loss.alpha_snippet"),
    (equations.total_loss, "alpha", "loss.alpha_video"),
    (equations.total_loss, "beta", "loss.beta"),
    (equations.total_loss, "gamma", "loss.gamma"),
    (equations.total_loss, "tau", "loss.threshold"),
    (equations.localize, "inflation", "localization.inflation"),
    (equations.localize, "nms_iou", "localization.nms_iou"),
    (equations.localize, "score_floor", "localization.score_floor"),
    *(
        (losses.DiscriminativeLoss, name, f"loss.{name}")
        for name in inspect.signature(losses.DiscriminativeLoss).parameters
    ),
    *(
        (made, name, f"loss.snippet_{name}")
        for made in (losses.SnippetDenoising, losses.SnippetDMI)
        for name in inspect.signature(made).parameters
    ),
    (losses.VideoDenoising, "topk_divisor", "loss.topk_divisor"),
    (losses.VideoDenoising, "probability_floor", "loss.probability_floor"),
    (losses.VideoDenoising, "peak_share", "loss.video_peak_share"),
    (losses.VideoDenoising, "normalization", "loss.video_normalization"),
    (losses.UncertaintyModeling, "magnitude", "loss.um_magnitude"),
    (losses.UncertaintyModeling, "margin", "loss.um_margin"),
    (losses.FocalLoss, "beta", "loss.beta"),
    (ops.topk_pool, "divisor", "loss.topk_divisor"),
    (ops.tcam_pool, "divisor", "loss.topk_divisor"),
    (ops.attention_pool, "threshold", "loss.threshold"),
    (ops.attention_pool, "background_threshold", "loss.background_threshold"),
    (ops.attention_pool, "reduction", "loss.embedding_pooling"),
    (ops.log_condition_number, "rank_tol", "loss.snippet_rank_tol"),
    (ops.joint_log_condition_number, "rank_tol", "loss.snippet_rank_tol"),
    (ops.snippet_pdmi, "fg_threshold", "loss.snippet_fg_threshold"),
    (ops.snippet_pdmi, "bg_threshold", "loss.snippet_bg_threshold"),
    (ops.snippet_pdmi, "normalization", "loss.snippet_normalization"),
    (ops.snippet_pdmi, "entry_floor", "loss.snippet_entry_floor"),
    (ops.snippet_pdmi, "rank_tol", "loss.snippet_rank_tol"),
    *((LossSettings, name, f"loss.{name}") for name in ("topk_divisor", "min_snippets", "skip_unlabelled", "momentum")),
    *((LossSettings, name, f"loss.{name}") for name in ("beta", "gamma", "threshold", "background_threshold")),
    (LossSettings, "probability_floor", "loss.probability_floor"),
    *((LossSettings, name, f"loss.snippet_{name}") for name in ("fg_threshold", "bg_threshold", "own_classes")),
    *((LossSettings, name, f"loss.snippet_{name}") for name in ("entry_floor", "rank_tol")),
    *(
        (ops.extract_proposals, name, f"localization.{name}")
        for name in ("min_length", "inflation", "outer", "nms_iou")
    ),
]


@pytest.mark.parametrize(("function", "argument", "setting"), DEFAULTS)
def test_a_default_that_is_written_twice_is_the_papers(function, argument, setting):
    default = inspect.signature(function).parameters[argument].default
    assert default == value("thumos14-paper", setting)


def test_the_thresholds_of_the_equations():
    assert equations.THRESHOLDS == pytest.approx(value("thumos14-paper", "localization.thresholds"))
