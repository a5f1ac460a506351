"""Recipes hold the paper's numbers and refuse what they do not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2net.errors import InputError
from d2net.recipes import Recipe, differences, load_recipe, recipe_names


def test_paper_values():
    thumos, activitynet = load_recipe("thumos14-paper"), load_recipe("activitynet12-paper")
    assert (thumos.model.kernel_size, thumos.model.dilation) == (3, 1)
    assert (activitynet.model.kernel_size, activitynet.model.dilation) == (5, 2)
    assert (thumos.loss.alpha_snippet, thumos.loss.alpha_video) == (0.2, 0.2)
    assert (activitynet.loss.alpha_snippet, activitynet.loss.alpha_video) == (1e-3, 1e-3)
    assert (thumos.loss.beta, thumos.loss.gamma, thumos.training.batch_size) == (2, 0.01, 10)
    assert (thumos.training.iterations, thumos.training.learning_rate) == (20_000, 1e-4)
    assert thumos.training.weight_decay == 0.005
    assert thumos.localization.thresholds[0] == 0.025 and thumos.localization.thresholds[-1] == 0.5
    assert len(thumos.localization.thresholds) == 20
    assert len(activitynet.evaluation.tiou) == 10


@pytest.mark.parametrize("name", recipe_names())
def test_round_trip(name):
    recipe = load_recipe(name)
    assert Recipe.from_dict(recipe.to_dict(), source="test") == recipe
    assert recipe.description


def test_override():
    recipe = load_recipe("watch").override(["training.learning_rate=3e-4", "localization.thresholds=[0.1, 0.2]"])
    assert recipe.training.learning_rate == 3e-4 and recipe.localization.thresholds == (0.1, 0.2)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.iteratons=3", "did you mean 'iterations'"),
        ("trainng.iterations=3", "section.key=value .did you mean 'training'"),
        ("loss.denoising=pdmii", "did you mean 'pdmi'"),
        ("loss.classification=3", "expected discriminative or focal or cross_entropy"),
        ("loss.video_peak_share=high", "expected a number or null"),
        ("loss.alpha_video=true", "expected a number"),
        ("training.iterations", "section.key=value"),
        ("training.iterations=many", "expected an integer"),
        ("model.residual=1", "expected true or false"),
        ("loss.beta=[1]", "expected a number"),
        ("localization.thresholds=0.1", "expected a list of numbers"),
        ("evaluation.protocol=thumos", "expected activitynet or wtalc"),
        ("loss.beta={", "not a YAML value"),
    ],
)
def test_bad_settings(assignment, message):
    with pytest.raises(InputError, match=message):
        load_recipe("watch").override([assignment])


def test_null_is_a_value_where_it_has_a_meaning():
    recipe = load_recipe("thumos14-release").override(["loss.video_peak_share=null", "localization.max_classes=3"])
    assert recipe.loss.video_peak_share is None and recipe.localization.max_classes == 3
    with pytest.raises(InputError, match="loss.beta: expected a number"):
        recipe.override(["loss.beta=null"])


def test_differences():
    paper, release = load_recipe("thumos14-paper"), load_recipe("thumos14-release")
    rows = dict(differences([paper, release]))
    assert rows["training.batch_size"] == [10, 20]
    assert rows["loss.pairing"] == ["different", "permutation"]
    assert "loss.beta" not in rows
    assert not differences([paper, paper])


@pytest.mark.parametrize("dataset", ["thumos14", "activitynet12"])
def test_every_difference_between_paper_and_release_is_documented(dataset):
    text = (Path(__file__).parents[1] / "docs" / "fidelity.md").read_text(encoding="utf-8")
    recipes = [load_recipe(f"{dataset}-{kind}") for kind in ("paper", "release")]
    missing = [key for key, _ in differences(recipes) if f"`{key}`" not in text]
    assert not missing


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'thumos14-paper'"):
        load_recipe("thumos14")
