"""``d2net study ablation``: its numbers are those of its trainings, and it goes on where it stopped."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from typer.testing import CliRunner

from d2net.checkpoint import CHECKPOINT_NAME, load_model
from d2net.cli import app
from d2net.data import Dataset, simulate
from d2net.data.watch import TRAIN_SUBJECTS
from d2net.errors import D2NetError, InputError
from d2net.evaluation import FALSE_POSITIVES, evaluate, is_action, operating_points, snippet_auc
from d2net.localization import localize, predict
from d2net.losses import FocalLoss, SnippetDenoising, VideoDenoising
from d2net.recipes import load_recipe
from d2net.studies.ablation import (
    LOSSES,
    Ablation,
    Row,
    Variant,
    choose_losses,
    draw,
    make_rows,
    parse_variant,
    tables_of,
    write_page,
    write_tables,
)
from d2net.studies.ablation.table import Difference, difference, equal_recall
from d2net.training import Trainer

SMALL = [
    *("training.iterations=12", "training.batch_size=3", "training.max_snippets=60", "model.embedding_dim=8"),
    *("training.learning_rate=0.02", "localization.thresholds=[0.1, 0.2, 0.3]"),
]
WEIGHTS = ["loss.alpha_snippet=0.01", "loss.alpha_video=0.001"]  # the recipe has no L_D
RECIPE = load_recipe("watch").override([*SMALL, *WEIGHTS])
TWO = [LOSSES["focal"], LOSSES["d2net"]]
needs_watch = pytest.mark.skipif(
    importlib.util.find_spec("seglearn") is None, reason="seglearn ships the recordings: pip install seglearn==1.2.5"
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return simulate(stream_widths=(8, 8))


def study(out: Path, data: Dataset | None, variants: list[Variant] = TWO, **options) -> Ablation:
    return Ablation(out, options.pop("recipe", RECIPE), variants, data=data, **{"seeds": 2, **options})


def run(*arguments: object, code: int = 0):
    command = ["study", "ablation", *map(str, arguments)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "120", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*arguments: object) -> str:
    lines = run(*arguments, code=2).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_rows_of_the_paper() -> None:
    recipe = load_recipe("thumos14-paper")
    rows = {name: recipe.override(list(v.settings)).loss for name, v in LOSSES.items()}
    weights = {name: (loss.classification, loss.alpha_snippet, loss.denoising) for name, loss in rows.items()}
    assert weights == {
        "cross-entropy": ("cross_entropy", 0, "pdmi"),
        "focal": ("focal", 0, "pdmi"),
        "dis": ("discriminative", 0, "pdmi"),
        "d2net": ("discriminative", 0.2, "pdmi"),
        "l1": ("discriminative", 0.2, "l1"),
        "bce": ("discriminative", 0.2, "bce"),
        "dmi": ("discriminative", 0.2, "dmi"),
    }
    assert all(loss.alpha_video == loss.alpha_snippet for loss in rows.values())
    assert rows["d2net"] == recipe.loss


def test_a_result_is_that_of_the_training(tmp_path: Path, data: Dataset) -> None:
    results = study(tmp_path / "study", data).execute()
    assert [(r["variant"], r["seed"]) for r in results] == [("focal", 0), ("d2net", 0), ("focal", 1), ("d2net", 1)]
    recipe = RECIPE.override(list(LOSSES["focal"].settings))
    checkpoint = Trainer(data.subset("train"), recipe, out=tmp_path / "alone", seed=1, tensorboard=False).run()
    test = data.subset("test")
    found = localize(load_model(checkpoint), test)
    expected = evaluate(found, test.annotations(), tiou=recipe.evaluation.tiou).to_json()
    assert {k: results[2][k] for k in expected} == expected and results[2]["detections"] == len(found)
    assert results[2]["refined"]["map"] == expected["map"]
    raw = localize(load_model(checkpoint), test, replace(recipe.localization, attention=False))
    assert results[2]["raw"]["map"] == evaluate(raw, test.annotations()).to_json()["map"]
    assert results[2]["raw"]["map"] != results[2]["refined"]["map"]
    points = operating_points(raw, test.annotations())
    assert results[2]["raw"]["best_f1"] == points.f1 >= results[2]["raw"]["f1"]
    # AUC of lambda, of all snippets together.
    tcams = [predict(load_model(checkpoint), test.features(i))[0].numpy() for i in range(len(test))]
    action = [is_action(r, len(x)) for r, x in zip(test.recordings, tcams, strict=True)]
    auc = snippet_auc(np.concatenate([x.max(1) for x in tcams]), np.concatenate(action))
    assert results[2]["raw"]["auc"] == pytest.approx(auc)
    assert results[2]["dataset"] == data.name and results[2]["settings"]["loss"]["classification"] == "focal"


def made_up(name: str, seed: int, x: float, people: tuple[int, ...] = ()) -> dict:
    """A result whose refined TCAM is worth ``x``, and the raw one half of it."""

    def of(x: float) -> dict:
        kinds = dict.fromkeys(FALSE_POSITIVES, 2)
        counts: dict[str, Any] = {
            "map": {"0.1": 2.0 * x, "0.5": x},
            "average": x,
            "f1": x / 2,
            "best_f1": x,
            "auc": 90.0,
        }
        return {
            **counts,
            "protocol": "activitynet",
            "said": [],
            "detections": 7,
            "false_positives": {"0.1": kinds, "0.2": None},
        }

    return {
        "variant": name,
        "seed": seed,
        "held_out_subjects": list(people),
        "raw": of(x / 2),
        "refined": of(x),
    }


def test_tables(tmp_path: Path, data: Dataset) -> None:
    experiment = study(tmp_path, data)
    results = [
        made_up(name, seed, x)
        for seed, values in enumerate(((10.0, 20.0), (14.0, 20.0)))
        for name, x in zip(("focal", "d2net"), values, strict=True)
    ]
    rows = make_rows(experiment, results)
    assert [(r.variant.name, r.tcam) for r in rows] == [
        *(("focal", "raw"), ("focal", "refined")),
        *(("d2net", "raw"), ("d2net", "refined")),
    ]
    assert rows[1].summary("0.5") == (12.0, pytest.approx(np.std([10, 14], ddof=1)))
    assert rows[0].summary("0.5") == (6.0, pytest.approx(np.std([5, 7], ddof=1)))
    assert rows[3].summary("f1") == (10.0, 0.0)
    assert difference(rows[3], rows[1], "0.5") == Difference(8.0, None)
    written = write_tables(experiment, rows)
    with open(tmp_path / "ablation.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(x["variant"], x["tcam"], float(x["map@0.5_mean"]), x["runs"]) for x in lines] == [
        *(("focal", "raw", 6.0, "2"), ("focal", "refined", 12.0, "2")),
        *(("d2net", "raw", 10.0, "2"), ("d2net", "refined", 20.0, "2")),
    ]
    assert "simulated" in lines[0]["dataset"] and float(lines[3]["f1_deviation"]) == 0
    table = json.loads((tmp_path / "ablation.json").read_text())
    assert "simulated" in table["dataset"]
    above = {"mean": 8.0, "interval": None, "settled": False}
    assert table["variants"][1]["refined"]["above_first"]["map@0.5"] == above
    assert table["variants"][0]["refined"]["above_first"] == {}
    assert len(table["variants"][0]["runs"]) == 2
    assert written[3].read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "ablation-runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == 8 and runs[3]["variant"] == "focal" and runs[3]["tcam"] == "refined"
    assert (runs[3]["seed"], float(runs[3]["map@0.5"]), runs[3]["detections"]) == ("1", 14.0, "7")
    first, second = tables_of(experiment, rows)
    assert first.cells[3][-2:] == ("+8.0 not settled", "+4.0 not settled") and "fewer than 5" in " ".join(first.notes)
    assert second.title.endswith("recall 10 %") and second.cells[0][2:] == (*(5 * ("2.0",)), "10.0", "2 of 2")
    one = make_rows(experiment, results[:2])
    assert one[1].summary("0.5") == (10.0, None)
    write_tables(experiment, one)


def compared(gains: np.ndarray, tmp_path: Path, data: Dataset) -> Difference | None:
    """The difference of two variants whose runs, (seeds, people), are so far apart."""
    results = [
        made_up(name, seed, 50.0 + gain, (person,))
        for (seed, person), gained in np.ndenumerate(gains)
        for name, gain in (("focal", 0.0), ("d2net", float(gained)))
    ]
    rows = make_rows(study(tmp_path, data), results)
    found = difference(rows[3], rows[1], "0.5")
    assert found == difference(rows[3], rows[1], "0.5")  # the same table gives the same interval
    return found


def test_an_interval_is_over_seeds_and_people(tmp_path: Path, data: Dataset) -> None:
    """What differs between people alone is as uncertain as two people are, however many seeds there are."""
    found = compared(np.tile([1.0, 9.0], (6, 1)), tmp_path, data)
    assert found is not None and found.interval is not None and found.mean == pytest.approx(5.0) and not found.settled
    assert found.interval[0] < -20 and found.interval[1] > 30  # Student's quantile of one degree of freedom
    many = compared(np.tile([4.0, 5.0, 6.0, 5.0, 4.5, 5.5, 5.0], (6, 1)), tmp_path, data)
    assert many is not None and many.settled and many.mean == pytest.approx(5.0)
    assert str(many).startswith("+5.0 [+4.")
    nothing = compared(np.full((5, 7), 1e-14), tmp_path, data)
    assert nothing is not None and not nothing.settled
    assert not Difference(5.0, (-0.1, 9.0)).settled


@pytest.mark.parametrize(("seeds", "people", "most"), [(5, 1, 0.1), (5, 7, 0.1), (3, 2, 0.1)])
def test_nothing_is_rarely_called_settled(seeds: int, people: int, most: float, tmp_path: Path, data: Dataset) -> None:
    rng = np.random.default_rng(0)
    called = []
    for _ in range(150):
        noise = 0.7 * rng.normal(size=(seeds, 1)) + 0.7 * rng.normal(size=(1, people)) * (people > 1)
        found = compared(noise + 0.5 * rng.normal(size=(seeds, people)), tmp_path, data)
        called.append(found is not None and found.settled)
    assert np.mean(called) <= most


def test_false_positives_are_of_all_runs_or_not_shown(tmp_path: Path, data: Dataset) -> None:
    results = [made_up(name, seed, 10.0) for seed in range(2) for name in ("focal", "d2net")]
    experiment = study(tmp_path, data)
    rows = make_rows(experiment, results)
    assert equal_recall(rows) == "0.1"
    for result in results[:3]:  # of d2net's two runs one reaches 20 %
        for tcam in ("raw", "refined"):
            result[tcam]["false_positives"]["0.2"] = dict.fromkeys(FALSE_POSITIVES, 8)
    assert equal_recall(rows) == "0.2" and rows[0].false_positives("0.2") == (dict.fromkeys(FALSE_POSITIVES, 8), 2)
    assert rows[2].false_positives("0.2") == ({}, 1)
    shown = tables_of(experiment, rows)[1]
    assert shown.cells[0][2:] == (*5 * ("8.0",), "40.0", "2 of 2") and shown.cells[2][2:] == (*6 * ("-",), "1 of 2")
    assert "would not be comparable" in shown.notes[1]
    for result in results:
        result["raw"]["false_positives"] = {"0.1": None, "0.2": None}
    assert equal_recall(rows) is None
    (why,) = tables_of(experiment, rows)[1].notes
    assert "focal does not find a tenth of the actions" in why
    pytest.importorskip("bokeh", reason="pages are drawn by Bokeh: pip install 'd2net[report]'")
    write_page(experiment, rows, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "at equal recall: not shown: a training of focal does not find" in page


def test_rows_of_other_levels_and_protocols(tmp_path: Path, data: Dataset) -> None:
    """Shown is what all rows have; what cannot be compared is not."""
    results = [made_up(name, seed, 10.0) for seed in range(2) for name in ("focal", "d2net")]
    for result in results[1::2]:
        for tcam in ("raw", "refined"):
            result[tcam]["map"] = {"0.5": 12.0, "0.75": 3.0}
            result[tcam]["protocol"] = "wtalc"
    experiment = study(tmp_path, data)
    rows = make_rows(experiment, results)
    first = tables_of(experiment, rows)[0]
    assert first.header[2:6] == ("mAP@0.5", "F1@0.5", "best F1", "AUC")
    assert first.cells[2][-2:] == ("", "") and "focal: activitynet, d2net: wtalc" in first.notes[0]
    write_tables(experiment, rows)


def drawn(labels: list[str], values: list[float], name: str, over: str) -> list[Text]:
    """The texts of the figure of variants that were each trained once for every value."""
    results = tuple({"refined": {"map": {"0.5": v}, "average": v, "f1": v / 2}} for v in values)
    rows = [Row(Variant(f"v{i}", label), "refined", results) for i, label in enumerate(labels)]
    figure = draw(rows, name, over)
    figure.draw_without_rendering()
    numbers = [t for ax in figure.axes for t in ax.get_xticklabels()]  # also of ticks beyond the axis, not drawn
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible() and t not in numbers]
    for box in (t.get_window_extent() for t in texts):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert all(ax.get_position().width > 0.2 for ax in figure.axes)
    return texts


def test_the_figure_says_mean_and_deviation_where_there_are_several_trainings() -> None:
    said = [t.get_text() for t in drawn(["a", "b"], [59.0, 60.0, 61.0], "tiny", "3 seeds")]
    assert said.count("60.0 ± 1.0") == said.count("30.0 ± 0.5") == 2 and "Ablation on tiny; 3 seeds" in said
    assert sum("mean ± sample deviation over the trainings" in text for text in said) == 1
    said = [t.get_text() for t in drawn(["a", "b"], [60.0], "tiny", "1 seed")]
    assert said.count("60.0") == 2 and not any("±" in text or "deviation" in text for text in said)


def test_the_figure_has_room_for_any_names() -> None:
    names = ["a_very_long_name_of_a_variant_with_more_than_forty_letters", "cost $5$ _x_ {y}", "two\nlines", "_b"]
    texts = drawn(names, [59.0, 61.0], "data$set_of a name\n" + "x" * 60, "3 seeds x 7 held-out training subjects")
    said = [t.get_text() for t in texts]
    assert {"cost $5$ _x_ {y}", "two lines", "_b"} <= set(said)
    assert any(text.replace("\n", "") == names[0] for text in said)
    assert not any(t.get_parse_math() for t in texts if "$" in t.get_text())


def test_goes_on_where_it_stopped(tmp_path: Path, data: Dataset) -> None:
    whole = study(tmp_path / "whole", data).execute()
    out = tmp_path / "broken"
    calls = []

    def interrupt(what: str, done: int, total: int, result: object) -> None:
        calls.append((what, done, total, result is not None))
        if what == "d2net, seed 0" and done == 22:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C: the training finishes an iteration and saves itself

    with pytest.raises(KeyboardInterrupt, match="1 of 4 trainings are done; the same command"):
        study(out, data).execute(interrupt)
    assert calls[0] == ("focal, seed 0", 10, 48, False) and calls[-1] == ("d2net, seed 0", 23, 48, False)
    assert not (out / "d2net" / "seed-0" / "result.json").exists()
    half = json.loads((out / "d2net" / "seed-0" / "checkpoint.json").read_text())
    assert half["iteration"] == 11
    calls.clear()
    again = study(out, data).execute(lambda *call: calls.append(call))
    assert again == whole
    assert {call[0] for call in calls} == {"d2net, seed 0", "focal, seed 1", "d2net, seed 1"}
    assert calls[-1][1:3] == (36, 36)
    study(out, data).execute(lambda *call: pytest.fail("nothing is left to do"))


def test_a_signal_in_the_last_iteration_of_a_training_stops_the_study(tmp_path: Path, data: Dataset) -> None:
    """The training is done then and the next one must not begin."""
    calls = []

    def interrupt(what: str, done: int, total: int, result: object) -> None:
        calls.append(what)
        if done == 12 and result is None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="0 of 4 trainings are done; the same command"):
        study(tmp_path, data).execute(interrupt)
    assert set(calls) == {"focal, seed 0"}
    assert json.loads((tmp_path / "focal" / "seed-0" / "checkpoint.json").read_text())["iteration"] == 12
    assert len(study(tmp_path, data).execute()) == 4


def test_seeds_and_variants_can_be_added(tmp_path: Path, data: Dataset) -> None:
    first = study(tmp_path, data, seeds=1).execute()
    trained = set()
    more = study(tmp_path, data, [*TWO, LOSSES["dis"]], seeds=2).execute(lambda what, *_: trained.add(what))
    assert more[:2] == first and trained == {"dis, seed 0", "focal, seed 1", "d2net, seed 1", "dis, seed 1"}


def test_variants_of_localization_share_a_training(tmp_path: Path, data: Dataset) -> None:
    plain = Variant("plain", "plain", (*LOSSES["focal"].settings, "localization.attention=false"))
    alone = study(tmp_path / "alone", data, [plain], seeds=1).execute()
    assert study(tmp_path / "both", data, [LOSSES["focal"], plain], seeds=1).execute()[1:] == alone
    assert (tmp_path / "both" / "focal" / "seed-0" / CHECKPOINT_NAME).exists()
    assert [p.name for p in (tmp_path / "both" / "plain" / "seed-0").iterdir()] == ["result.json"]


def test_refuses_the_folder_of_something_else(tmp_path: Path, data: Dataset) -> None:
    study(tmp_path / "a", data, seeds=1).execute()
    other = RECIPE.override(["training.learning_rate=0.01"])
    with pytest.raises(InputError, match="training.learning_rate was 0.02 and is 0.01.*choose another --out"):
        study(tmp_path / "a", data, recipe=other)
    # The same name for other settings; and for the same ones, said differently.
    changed = [Variant("focal", "focal", ("loss.classification=focal",))]
    with pytest.raises(InputError, match="loss.alpha_snippet was 0.0 and is 0.01"):
        study(tmp_path / "a", data, changed, seeds=1).execute()
    same = [Variant("focal", "focal", tuple(reversed(LOSSES["focal"].settings)))]
    study(tmp_path / "a", data, same, seeds=1).execute(lambda *_: pytest.fail("is done already"))
    renamed = replace(data, classes=("Dive", *data.classes[1:]), recordings=data.recordings)
    with pytest.raises(InputError, match="classes was"):
        study(tmp_path / "a", replace(renamed, recordings=_relabel(data, data.classes[0], "Dive")))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "summary.json").write_text("{}")
    with pytest.raises(InputError, match="holds other files"):
        study(tmp_path / "b", data)
    (tmp_path / "a" / "focal" / "seed-0" / "result.json").write_text("{")
    with pytest.raises(InputError, match="result.json: not valid JSON"):
        study(tmp_path / "a", data, seeds=1).execute()


def _relabel(data: Dataset, old: str, new: str):
    def name(x: str) -> str:
        return new if x == old else x

    return tuple(
        replace(r, labels=tuple(map(name, r.labels)), segments=tuple((s, e, name(c)) for s, e, c in r.segments))
        for r in data.recordings
    )


def test_a_training_that_is_not_finite_names_its_variant(tmp_path: Path, data: Dataset) -> None:
    wild = Variant("wild", "wild", ("training.learning_rate=1e30",))
    with pytest.raises(D2NetError, match="wild, seed 0: the training is not finite.*leave this variant out"):
        study(tmp_path, data, [LOSSES["focal"], wild], seeds=1).execute()
    assert (tmp_path / "focal" / "seed-0" / "result.json").exists()


def test_same_settings_are_told(tmp_path: Path, data: Dataset) -> None:
    without = RECIPE.override(["loss.alpha_snippet=0", "loss.alpha_video=0"])
    assert study(tmp_path, data, choose_losses("dis,d2net"), recipe=without).duplicates() == [("d2net", "dis")]
    never = Variant("never", "never", ("training.denoising_start=12",))  # after the last iteration
    assert study(tmp_path / "b", data, [LOSSES["dis"], never]).duplicates() == [("never", "dis")]


def test_parsing() -> None:
    assert [v.name for v in choose_losses("dis, focal,dis")] == ["dis", "focal"]
    assert parse_variant("a-1: x.y=1  z.w=2") == Variant("a-1", "a-1", ("x.y=1", "z.w=2"))
    assert parse_variant("recipe:").settings == ()
    for text in ("a", ": x=1", "a b: x=1", "../a: x=1"):
        with pytest.raises(InputError, match="NAME: key=value"):
            parse_variant(text)


def test_command(tmp_path: Path) -> None:
    settings = [a for s in [*SMALL, "training.iterations=2"] for a in ("--set", s)]
    command = ["--data", "simulated", "--out", tmp_path / "s", "--seeds", 2, *settings, "--losses", "focal,d2net"]
    result = run(*command, "--with", "um", "--variant", "mine: loss.gamma=0", "--device", "cpu")
    title = "Ablation on simulated made-up timeline; 2 seeds"
    assert title in result.stdout and "mAP@0.5" in result.stdout and "D2-Net + UM" in result.stdout
    assert "mine, seed 1: mAP@0.5" in result.stderr and "100% done" in result.stderr
    recipe = json.loads((tmp_path / "s" / "d2net+um" / "seed-1" / "checkpoint.json").read_text())["recipe"]
    assert recipe["loss"]["um_weight"] == 1
    page = (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    assert "D2-Net + UM" in page and "mine: loss.gamma=0" in page and "Loss of each training" in page
    whole = run(*command[:-2], "--with", "um", "--device", "cpu").stdout  # the rest of the rows join those there
    assert all(label in whole for label in ("L_CE", "L1 in L_D", "DMI in L_D", "D2-Net + UM"))
    again = run(*command, "--device", "cpu")
    assert again.stderr == "" and title in again.stdout
    # A result of a d2net that measured less is judged again, without training again.
    result = tmp_path / "s" / "focal" / "seed-0" / "result.json"
    before = json.loads(result.read_text())
    result.write_text(json.dumps({k: v for k, v in before.items() if k not in ("raw", "refined")}))
    weights = (result.parent / CHECKPOINT_NAME).read_bytes()
    run(*command, "--device", "cpu")
    assert json.loads(result.read_text()) == before and (result.parent / CHECKPOINT_NAME).read_bytes() == weights


def test_errors_are_one_line(tmp_path: Path) -> None:
    simulated = ["--data", "simulated", "--out", tmp_path / "out"]
    assert "no seeds" in fails(*simulated, "--seeds", 0)
    assert "unknown variant 'focl' (did you mean 'focal'?)" in fails(*simulated, "--losses", "focl")
    assert "names none" in fails(*simulated, "--losses", ",")
    assert "--with ul" in fails(*simulated, "--with", "ul")
    assert "NAME: key=value" in fails(*simulated, "--variant", "x=1")
    assert "called 'focal'" in fails(*simulated, "--losses", "focal", "--variant", "focal:")
    assert "variant 'a': --set: section loss: unknown key" in fails(
        *simulated, "--variant", "a: loss.gama=1", "--set", "training.batch_size=2"
    )
    assert "only for --data watch" in fails(*simulated, "--variant", "a: watch.tilt=0")
    assert "people of 'watch'" in fails(*simulated, "--cross-validate")
    assert "--folds is for --cross-validate" in fails(*simulated, "--folds", 3)
    assert "fewer than a batch of 17" in fails(*simulated, "--set", "training.batch_size=17")
    assert "there is no subset 'val'" in fails(*simulated, "--eval-subset", "val")
    assert "leave --subset" in fails("--data", "watch", "--subset", "train", "--out", tmp_path / "out")
    assert "unknown layout" in fails("--data", tmp_path, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        text = fails("--data", "simulated", "--set", "training.batch_size=2", "--out", place)
        assert str(place) in text and "give another path" in text


def test_one_class_and_nothing_to_judge_on(tmp_path: Path, data: Dataset) -> None:
    only = data.classes[0]
    one = tuple(
        replace(r, labels=(only,), segments=tuple(s for s in r.segments if s[2] == only)) for r in data.recordings
    )
    with pytest.raises(InputError, match=f"one class only, {only}"):
        study(tmp_path, replace(data, classes=(only,), recordings=one))
    bare = tuple(replace(r, segments=()) for r in data.recordings)
    with pytest.raises(InputError, match="no segment"):
        study(tmp_path, replace(data, recordings=bare))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path, data: Dataset) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        study(tmp_path / "out", data)


@needs_watch
def test_cross_validation_leaves_out_training_people_only(tmp_path: Path) -> None:
    few = Variant("few", "few", ("watch.train_recordings=12", "watch.tilt=0"))
    experiment = study(tmp_path, None, [few], seeds=1, folds=7)
    assert [r.held_out for r in experiment.runs] == [(s,) for s in TRAIN_SUBJECTS]
    for run_ in experiment.runs[:2]:
        train, test = experiment._split(run_)
        people = {int(r.name.split("_s")[1][:2]) for r in train.recordings}
        assert len(train) == 12 and people == set(TRAIN_SUBJECTS) - set(run_.held_out)
        assert {int(r.name.split("_s")[1][:2]) for r in test.recordings} == set(run_.held_out)
    assert experiment.over == "1 seed x 7 held-out training subjects"
    groups = study(tmp_path / "groups", None, [few], seeds=2, folds=3)
    assert [r.held_out for r in groups.runs] == 2 * [(1, 4, 7), (2, 5), (3, 6)]
    assert groups.over == "2 seeds x 3 groups of training subjects"
    assert str(groups.runs[4].folder) == os.path.join("few", "seed-1-without-2-5")
    for folds in (1, 8):
        with pytest.raises(InputError, match="2 to 7 groups"):
            study(tmp_path, None, [few], folds=folds)
    with pytest.raises(InputError, match="unknown setting watch.tlt"):
        study(tmp_path, None, [Variant("a", "a", ("watch.tlt=1",))])
    for text in ("x", "1_0", "\u0661"):
        with pytest.raises(InputError, match="watch.tilt=.* is not a number"):
            study(tmp_path, None, [Variant("a", "a", (f"watch.tilt={text}",))])
    with pytest.raises(InputError, match="watch.difficulty=harder: give easy or hard"):
        study(tmp_path, None, [Variant("a", "a", ("watch.difficulty=harder",))])
    with pytest.raises(InputError, match="different watch.difficulty have other recordings and classes"):
        study(tmp_path, None, [Variant("a", "a", ("watch.difficulty=hard",)), Variant("b", "b")])
    # The usual value, said or not, is the same experiment.
    unsaid = "watch.train_recordings=12"
    variants = [Variant("a", "a", ("watch.tilt=15.0", "watch.difficulty=easy", unsaid)), Variant("b", "b", (unsaid,))]
    assert study(tmp_path / "said", None, variants, seeds=1).duplicates() == [("b", "a")]


@needs_watch
def test_set_says_how_the_recordings_of_all_rows_are_made(tmp_path: Path) -> None:
    few = ["watch.train_recordings=6", "training.iterations=2", "training.batch_size=3"]
    options = [x for setting in few for x in ("--set", setting)]
    rows = ["--variant", "flat: watch.tilt=0", "--variant", "one: watch.train_recordings=7"]
    run("--data", "watch", "--cross-validate", "--folds", 2, "--seeds", 1, "--out", tmp_path, *options, *rows)
    made = {row["name"]: row["settings"] for row in json.loads((tmp_path / "ablation.json").read_text())["variants"]}
    assert made["flat"] == ["watch.train_recordings=6", "watch.tilt=0"]
    assert made["one"] == ["watch.train_recordings=6", "watch.train_recordings=7"]  # the later one counts
    result = json.loads(next((tmp_path / "one").glob("*/result.json")).read_text())
    assert result["settings"]["watch"]["train_recordings"] == 7


def test_help_has_examples() -> None:
    assert "\n   d2net study ablation --data watch" in run("--help").stdout


def test_what_pdmi_cannot_see() -> None:
    """docs/studies.md explains with this why L_D needs L_Dis to have settled which is which."""
    torch.manual_seed(0)
    tcam, embeddings, reference = torch.rand(4, 30, 5).double(), torch.randn(4, 30, 6).double(), torch.randn(6).double()
    snippet = SnippetDenoising()
    attention = tcam[:, :, :1]  # one class, so that it is the attention
    torch.testing.assert_close(
        snippet(attention, embeddings, None, reference), snippet(1 - attention, embeddings, None, reference)
    )
    video = VideoDenoising()
    p, counted = torch.rand(10, 5).double() * 0.8 + 0.1, torch.ones(10, dtype=torch.bool)
    labels = torch.eye(5).double().repeat(2, 1)
    value = video.from_pooled(p, counted, labels)
    torch.testing.assert_close(video.from_pooled(p.roll(1, 1), counted, labels), value)  # every class a wrong one
    torch.testing.assert_close(video.from_pooled(p / 2, counted, labels), value)  # half as sure
    # With two labels in half of the recordings, being half as sure of those is better than being right.
    pairs = torch.eye(5).double() + torch.eye(5).double().roll(1, 1)
    labels = torch.cat((torch.eye(5).double(), pairs))
    halved = torch.cat((torch.eye(5).double(), 0.55 * pairs))
    assert video.from_pooled(halved, counted, labels) < video.from_pooled(labels, counted, labels) - 0.3
    # At the start, when all scores are about the same, U_2 is nearly singular and the gradient outweighs that of Eq. 4;
    # once the scores are about right it does not.
    start = 0.4 + 0.02 * torch.randn(10, 5).double()
    assert _gradient(video.from_pooled, start, counted, labels) > 100 * _gradient(_focal, start, counted, labels)
    assert _gradient(video.from_pooled, 0.8 * labels + 0.1, counted, labels) < 2


def _focal(p: torch.Tensor, counted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return FocalLoss()(p[:, None], None, labels)  # a single snippet's activations are the scores


def _gradient(loss, p: torch.Tensor, counted: torch.Tensor, labels: torch.Tensor) -> float:
    p = p.clone().requires_grad_()
    return float(torch.autograd.grad(loss(p, counted, labels), p)[0].norm())


def test_a_study_is_of_its_annotations(tmp_path: Path) -> None:
    data = simulate(stream_widths=(8, 8))
    recipe = load_recipe("watch").override(["training.batch_size=4", "training.iterations=2"])
    Ablation(tmp_path / "out", recipe, choose_losses("focal"), seeds=1, data=data)
    other = replace(data, recordings=(replace(data.recordings[0], segments=()), *data.recordings[1:]))
    with pytest.raises(InputError, match="holds another study .annotations was"):
        Ablation(tmp_path / "out", recipe, choose_losses("focal"), seeds=1, data=other)


def test_losses_without_weight_are_one_experiment(tmp_path: Path) -> None:
    recipe = load_recipe("watch").override(["training.batch_size=4", "training.iterations=2"])  # both alpha are 0
    study = Ablation(
        tmp_path / "out", recipe, choose_losses("dis,d2net,l1,dmi"), seeds=1, data=simulate(stream_widths=(8, 8))
    )
    assert study.duplicates() == [("d2net", "dis"), ("l1", "dis"), ("dmi", "dis")]
    study.execute()
    assert [p.parent.parent.name for p in (tmp_path / "out").rglob("checkpoint.safetensors")] == ["dis"]


def test_a_training_that_finds_nothing_where_the_protocol_looks_does_not_end_the_study(tmp_path, monkeypatch) -> None:
    def nothing(*_, **__):
        raise InputError("no detection is left to judge")

    monkeypatch.setattr("d2net.studies.ablation.judging.evaluate", nothing)
    recipe = load_recipe("watch").override(["training.batch_size=4", "training.iterations=2"])
    study = Ablation(tmp_path / "out", recipe, choose_losses("focal"), seeds=1, data=simulate(stream_widths=(8, 8)))
    (result,) = study.execute()
    assert set(result["map"].values()) == {0.0} and result["said"] == [
        "every number is 0: no detection is left to judge"
    ]
