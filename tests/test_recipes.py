"""Recipes are read, changed and printed, and refuse what they do not know."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2net.errors import InputError
from d2net.localization import Localizer
from d2net.losses import D2NetLoss
from d2net.recipes import (
    EvaluationRecipe,
    LocalizationRecipe,
    LossRecipe,
    ModelRecipe,
    Recipe,
    TrainingRecipe,
    differences,
    in_yaml,
    load_recipe,
    recipe_names,
)


def test_activitynet13_is_what_the_paper_says_of_activitynet12():
    """The paper has no ActivityNet1.3, and the recipe says so."""
    recipe = load_recipe("activitynet13")
    assert not differences([load_recipe("activitynet12-paper"), recipe])
    assert "the paper has no 1.3" in recipe.description


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
        ("loss.classification=3", "is 3; it must be discriminative or focal or cross_entropy"),
        ("loss.video_peak_share=high", "is 'high'; it must be a number or null"),
        ("loss.alpha_video=true", "is True; it must be a number"),
        ("training.iterations", "section.key=value"),
        ("training.iterations=many", "is 'many'; it must be a whole number"),
        ("model.residual=1", "is 1; it must be true or false"),
        ("loss.beta=[1]", "it must be a number"),
        ("localization.thresholds=0.1", "is 0.1; it must be a list of at least one value"),
        ("evaluation.protocol=thumos", "it must be activitynet or wtalc"),
        ("loss.beta={", "not a YAML value"),
        ("loss.momentum=.nan", "loss.momentum is nan; it must be at least 0 and at most 1"),
        ("loss.beta=-.inf", "loss.beta is -inf; it must be at least 0 and finite"),
        ("training.learning_rate=1e38", r"it must be above 0 and at most 1e\+30"),
        ("training.iterations=-3", "is -3; it must be at least 1 and at most 1,000,000,000"),
        ("training.iterations=2.5", "is 2.5; it must be a whole number"),
        ("training.batch_size=true", "is True; it must be a whole number"),
        ("training.batch_size=" + "9" * 1900, r"9\.\.\.9+; it must be at least 1"),
        ("model.kernel_size=4", "is 4; it must be odd and at least 1"),
        ("localization.thresholds=[0.1, .nan]", r"thresholds\[1\] is nan; it must be finite"),
        ("localization.thresholds=[]", "a list of at least one value"),
        ("localization.class_threshold=1", "it must be at least 0 and below 1, a fraction of the best p"),
        ("evaluation.tiou=[0.5, 2]", r"tiou\[1\] is 2; it must be above 0 and at most 1"),
        ("loss.beta=&a [*a, *a]", "anchors, aliases and tags are not taken"),
        ("loss.beta=!!int ''", "anchors, aliases and tags are not taken"),
        ("loss.beta=" + "[" * 1900, "not a YAML value .maximum recursion depth"),
        ("training.iterations=1:30", "'1:30' is no number in decimal digits alone"),
        ("training.iterations=1_000", "'1_000' is no number in decimal digits alone"),
        ("training.iterations=0x10", "'0x10' is no number in decimal digits alone"),
        ("training.iterations=0b1", "'0b1' is no number in decimal digits alone"),
        ("training.iterations=010", "'010' is no number in decimal digits alone"),
        ("training.iterations=0o17", "is '0o17'; it must be a whole number"),
        ("training.iterations='1_000'", "is '1_000'; it must be a whole number"),
        ("loss.beta=1:30.5", "'1:30.5' is no number in decimal digits alone"),
        ("loss.beta=1_0.5", "'1_0.5' is no number in decimal digits alone"),
        ("localization.thresholds=[0.1, 0x1]", "'0x1' is no number in decimal digits alone"),
        ("loss.beta=1e308", r"loss.beta is 1e\+308; it must be at least 0 and finite in float32 \(up to 3.4e\+38\)"),
        ("loss.beta=1.0e+39", r"loss.beta is 1e\+39; it must be at least 0 and finite in float32 \(up to 3.4e\+38\)"),
        ("model.weight_std=1e30", r"is 1e\+30; it must be above 0 and at most 10"),
        ("loss.beta=" + "9" * 10**6, "has more than 2000 characters"),
        ("loss.beta=" + ":".join(["1"] * 900) + ".0", "not a YAML value .int too large"),
        ("loss.beta=2001-99-99", "not a YAML value .month"),
        ("loss.beta=\udcff", "not a YAML value"),
        ("loss.beta=\x1b[2J", r"'loss.beta=.x1b\[2J': not a YAML value"),
        ("loss." + "x" * 10**6 + "=1", r"unknown key 'x+\.\.\.x+'; known are"),
        ("x" * 10**6, r"x\.\.\.x+' is not of the form section.key=value"),
    ],
    ids=lambda text: text[:40].encode("ascii", "backslashreplace").decode(),
)
def test_bad_settings(assignment, message):
    with pytest.raises(InputError, match=message) as error:
        load_recipe("watch").override([assignment])
    assert len(str(error.value)) < 2001 and str(error.value).isprintable()


@pytest.mark.parametrize("text", ["2", "+2", "2.", "2.0", "02.0", "2e0", "2.0e+0", ".2e+1", "0.2E1"])
def test_decimal_numbers(text):
    assert load_recipe("watch").override([f"loss.beta={text}"]).loss.beta == 2


def test_a_recipes_file_has_decimal_numbers_too(tmp_path, monkeypatch):
    monkeypatch.setattr("d2net.recipes.resources.files", lambda _: tmp_path)
    (tmp_path / "mine.yaml").write_text("training: {iterations: 1:30}")
    with pytest.raises(InputError, match="recipe mine: not a YAML value .'1:30' is no number in decimal digits alone"):
        load_recipe("mine")


def test_settings_are_checked_in_python_too():
    with pytest.raises(InputError, match="loss.momentum is nan; it must be at least 0 and at most 1"):
        LossRecipe(momentum=float("nan"))
    with pytest.raises(InputError, match="training.iterations is 0"):
        replace(load_recipe("watch").training, iterations=0)
    with pytest.raises(InputError, match="model is None; it must be a ModelRecipe"):
        replace(load_recipe("watch"), model=None)
    assert LossRecipe(beta=np.float32(2), topk_divisor=np.int64(4)) == LossRecipe(topk_divisor=4)
    assert LocalizationRecipe(thresholds=[0, 1]).thresholds == (0.0, 1.0)


@pytest.mark.parametrize("section", [ModelRecipe, LossRecipe, TrainingRecipe, LocalizationRecipe, EvaluationRecipe])
def test_every_number_has_a_range(section):
    """No field takes NaN, Inf, a number that float32 does not hold, or a giant whole one."""
    known = vars(section())
    for name, value in known.items():
        if isinstance(value, (str, bool)):
            continue
        for bad in (float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 10**5000, True, "a", b"1"):
            with pytest.raises(InputError, match=rf"\w+\.{name}\S* is .*; it must be "):
                section(**{name: (bad,) if isinstance(value, tuple) else bad})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "x: expected keys and values, found list"),
        ({"name": 3}, "x: name is 3; it must be a text"),
        ({"loss": [1]}, "x: section loss: expected keys and values, found list"),
        ({"loss": {"bta": 1}}, "x: section loss: unknown key 'bta' .did you mean 'beta'"),
        ({"loss": {3: 1}}, "x: section loss: unknown key 3"),
        ({"training": {"ema_decay": float("nan")}}, "x: training.ema_decay is nan"),
    ],
)
def test_bad_tables(table, message):
    with pytest.raises(InputError, match=message):
        Recipe.from_dict(table, source="x")


def test_null_is_a_value_where_it_has_a_meaning():
    recipe = load_recipe("thumos14-release").override(["loss.video_peak_share=null", "localization.max_classes=3"])
    assert recipe.loss.video_peak_share is None and recipe.localization.max_classes == 3
    with pytest.raises(InputError, match="loss.beta is None; it must be a number"):
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


@pytest.mark.parametrize("name", recipe_names())
def test_a_printed_recipe_is_one(name, tmp_path):
    """Whole, with a comment for every setting; and the same when it is read back."""
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(in_yaml(load_recipe(name))), encoding="utf-8")
    assert replace(load_recipe(str(path)), name=name) == load_recipe(name)
    text = path.read_text(encoding="utf-8")
    for section in (ModelRecipe, LossRecipe, TrainingRecipe, LocalizationRecipe, EvaluationRecipe):
        for key in vars(section()):
            assert re.search(rf"^  {key}: .* # \S.*$", text, re.MULTILINE), key


def test_any_text_survives_printing(tmp_path):
    for text in ("a: b # c", "two\nlines", "' \" \\", "ü", "- x", "1", "null", "x" * 300, ""):
        recipe = replace(load_recipe("watch"), description=text)
        (tmp_path / "mine.yaml").write_text("\n".join(in_yaml(recipe)), encoding="utf-8")
        assert load_recipe(str(tmp_path / "mine.yaml")).description == text


def test_a_recipe_in_a_file_says_what_differs_from_the_paper(tmp_path):
    path = tmp_path / "Small.YML"
    path.write_bytes(b"\xef\xbb\xbfmodel: {embedding_dim: 8}\ntraining:\n  learning_rate: 1e-3\nloss:\n")
    assert load_recipe(str(path)) == Recipe(
        "Small", model=ModelRecipe(embedding_dim=8), training=TrainingRecipe(learning_rate=1e-3)
    )
    path.write_text("name: mine\n")
    assert load_recipe(str(path)) == Recipe("mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.yaml: expected keys and values, found NoneType"),
        ("[]", "mine.yaml: expected keys and values, found list"),
        ("training:\n  iteratons: 3\n", "mine.yaml: line 2: unknown key 'iteratons'.*did you mean 'iterations'"),
        ("model: {}\ntraning: {}\n", "mine.yaml: line 2: unknown key 'traning'.*did you mean 'training'"),
        (
            "# mine\n\ntraining:\n  iterations: many\n",
            "line 4: training.iterations is 'many'; it must be a whole",
        ),
        ("loss: {beta: 1,\n gamma: -1}\n", "mine.yaml: line 2: loss.gamma is -1; it must be at least 0"),
        ("loss:\n  denoising: pdmii\n", "line 2: loss.denoising is 'pdmii'.*did you mean 'pdmi'"),
        ("loss: 3\n", "mine.yaml: section loss: expected keys and values, found int"),
        ("name: 3\n", "mine.yaml: name is 3; it must be a text"),
        (
            "training:\n  iterations: 5\n  iterations: 6\n",
            "line 3: not a YAML value .'iterations' stands twice",
        ),
        ("loss:\n  beta: 1\nloss:\n  gamma: 0\n", "mine.yaml: line 3: not a YAML value .'loss' stands twice"),
        ("training:\n  iterations: 1_000\n", "mine.yaml: line 2: not a YAML value .'1_000' is no number"),
        ("training:\n\titerations: 5\n", "mine.yaml: line 2: not a YAML value"),
        ("a: [\n", "mine.yaml: .*not a YAML value"),
        ("a: &x 1\nb: *x\n", "mine.yaml: not a YAML value .anchors, aliases and tags are not taken"),
        ("1: 2\n", "mine.yaml: line 1: unknown key 1"),
        ("? [1, 2]\n: 3\n", "mine.yaml: .*not a YAML value"),
        ("training:\n  true: 3\n", "mine.yaml.*unknown key True"),
        (
            "localization:\n  class_threshold: 1\n",
            "localization.class_threshold is 1; it must be at least 0 and below 1",
        ),
        (b"\xff", "mine.yaml: not UTF-8"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as error:
        load_recipe(str(path))
    assert str(error.value).startswith(str(path)) and str(error.value).isprintable()


def test_settings_of_one_rule_are_looked_at_together(tmp_path):
    (tmp_path / "mine.yaml").write_text("localization:\n  class_threshold: 1\n  class_rule: absolute\n")
    assert load_recipe(str(tmp_path / "mine.yaml")).localization.class_threshold == 1


def test_no_such_recipe(tmp_path):
    with pytest.raises(InputError, match=r"gone\.yaml: no such file; d2net recipes NAME > gone\.yaml makes one"):
        load_recipe(str(tmp_path / "gone.yaml"))
    with pytest.raises(InputError, match="unknown recipe 'watsh' .did you mean 'watch'..; there are .* or give a file"):
        load_recipe("watsh")


def test_every_place_that_takes_a_recipes_name_takes_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("loss: {beta: 3}\nlocalization: {nms_iou: 0.25}\n")
    assert D2NetLoss.from_recipe(str(path), num_classes=2, embedding_dim=3).recipe.beta == 3
    assert Localizer.from_recipe(str(path)).recipe.nms_iou == 0.25
