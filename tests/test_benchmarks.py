"""The benchmarks' harness and gpu_check.sh keep what was measured, whatever fails; precision.py compares over seeds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the harness over cases given as {case: {contender: function}}; the exit status and what it wrote."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    def run(cases: dict, *options: str) -> tuple[int, dict, str]:
        def generate(*_: object) -> Iterator[harness.Case]:
            for name, contenders in cases.items():
                yield harness.Case(name, contenders() if callable(contenders) else contenders)

        where = {"device": "cpu", "processor": "", "threads": 1, "torch": "", "commit": "", "date": ""}
        monkeypatch.setattr(harness, "machine_rates", lambda _: {"bytes_per_s": 1e9, "flops": 1e9})
        monkeypatch.setattr(harness, "environment", lambda _: where)
        monkeypatch.setattr(harness, "keep_freed_memory", lambda: None)
        monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--out", str(tmp_path), *options])
        with pytest.raises(SystemExit) as stopped:
            harness.main("some work", generate)
        return (
            stopped.value.code,
            json.loads((tmp_path / "some_work.json").read_text()),
            (tmp_path / "some_work.md").read_text(),
        )

    return run


def fail() -> None:
    raise RuntimeError("no kernel | for this\nand more")


def wait() -> None:
    for _ in range(6000):
        time.sleep(0.01)


def test_a_contender_that_fails_is_a_row(run):
    status, result, table = run({"small": {"d2net": int, "other": fail}, "large": {"d2net": int}})
    assert status == 0
    assert [(row["case"], row["contender"], row.get("failed")) for row in result["rows"]] == [
        ("small", "d2net", None),
        ("small", "other", "RuntimeError: no kernel | for this"),
        ("large", "d2net", None),
    ]
    assert "| small | other | RuntimeError: no kernel / for this |" in table


@pytest.mark.parametrize("broken", [{"d2net": fail, "other": int}, fail])
def test_the_rest_is_measured_where_ours_fails(run, broken):
    status, result, table = run({"first": {"d2net": int}, "broken": broken})
    assert status == 1 and "ms" in result["rows"][0]
    assert "no kernel" in table
    assert ("left_out" in result) == callable(broken)


def test_out_of_time(run):
    first = {"d2net": int, "slow": wait, "third": int}
    status, result, _ = run({"first": first, "second": {"d2net": int}}, "--seconds", "6")
    assert status == 0 and result["rows"][3]["case"] == "second"
    assert [row.get("failed", "")[:11] for row in result["rows"][:3]] == ["", "out of time", ""]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_time_that_is_up_while_a_finalizer_runs(run):
    class Slow:
        def __del__(self) -> None:
            time.sleep(1)

    status, result, _ = run({"first": {"d2net": lambda: Slow() and wait()}}, "--seconds", "0.5")
    assert status == 1 and result["rows"][0]["failed"].startswith("out of time")


def test_what_comes_after_the_time_is_left_out(run):
    status, result, table = run({"first": {"d2net": wait}, "second": {"d2net": int}}, "--seconds", "1")
    assert status == 1 and result["rows"][0]["failed"].startswith("out of time")  # nothing was measured
    assert len(result["rows"]) == 1 and "Left out: what comes after first" in table


def test_the_first_cases_alone(run):
    cases = {"first": {"d2net": int}, "second": {"d2net": int}, "third": lambda: pytest.fail("made")}
    status, result, table = run(cases, "--first", "2")
    assert status == 0 and [row["case"] for row in result["rows"]] == ["first", "second"]
    assert "Only the first 2 cases" in table


def test_without_compilers(run):
    contenders = {"d2net": int, "int, compiled": fail, "torch.compile": fail, "other": int}
    status, result, table = run({"case": contenders}, "--no-compile")
    assert status == 0 and ["ms" in row for row in result["rows"]] == [True, False, False, True]
    assert table.count("left out (--no-compile)") == 2


def test_a_function_is_compiled_by_its_first_call(run, monkeypatch):
    import harness

    made = []
    monkeypatch.setattr(torch, "compile", lambda function: made.append(function) or function)
    function = harness.compiled(divmod)
    assert not made and function(7, 2) == function(7, 2) == (3, 1) and made == [divmod]


def test_a_slow_contender_is_called_twice(run, monkeypatch):
    import harness

    monkeypatch.setattr(harness, "SLOW_SECONDS", 0.05)
    calls = []
    _, result, table = run({"case": {"d2net": int, "slow": lambda: calls.append(time.sleep(0.06))}})
    assert len(calls) == 2 and result["rows"][1]["ms"] >= 60
    assert "(one call)" in table


def test_tests_are_noted_across_processes(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False, 'reason'\n"
        "def test_ends_the_process(): os._exit(1)\n"
        "def test_left(): pass\n"
    )
    (tmp_path / "test_unimportable.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "tests.tsv").touch()
    environment = os.environ | {"GPU_CHECK_TESTS": str(tmp_path / "tests.tsv"), "PYTHONPATH": str(BENCHMARKS)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_check_tests", "--rootdir", ".", "-c", "/dev/null"]
    for _ in range(2):
        subprocess.run([*command, "--continue-on-collection-errors", "."], cwd=tmp_path, env=environment)

    (tmp_path / "checks.tsv").write_text("tests\tpytest\tfailed\t3\texit status 1\n")
    (tmp_path / "environment.json").write_text(json.dumps({"device": "cpu", "torch": torch.__version__}))
    (tmp_path / "results").mkdir()
    report = [sys.executable, str(BENCHMARKS / "gpu_check_report.py"), str(tmp_path), str(tmp_path / "out")]
    assert subprocess.run(report, capture_output=True).returncode == 1
    outcomes = {
        name: test["outcome"] for name, test in json.loads((tmp_path / "out.json").read_text())["tests"].items()
    }
    assert outcomes == {
        "test_unimportable.py": "failed",
        "test_some.py::test_passes": "passed",
        "test_some.py::test_fails": "failed",
        "test_some.py::test_ends_the_process": "never ended",
        "test_some.py::test_left": "passed",
    }
    text = (tmp_path / "out.md").read_text()
    assert "`test_some.py::test_fails` failed: AssertionError: reason" in text
    assert "2 failed, 2 passed, 1 never ended" in text


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", BENCHMARKS / "gpu_check.sh", *arguments], capture_output=True, text=True)


def test_gpu_check_says_what_it_runs_and_for_how_long():
    text = gpu_check("--help").stdout
    assert "Without STAGE: build tests sanitizer step operators.\n" in text
    assert "(schedule sizes: only where they are named)" in text
    assert int(re.search(r"all stages together, (\d+) by default", text)[1]) < 8 * 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["buidl"], "'buidl'; stages: build tests"), (["--full"], "stage schedule"), (["--total", "0"], "--total needs")],
)
def test_gpu_check_refuses_what_it_does_not_know(arguments, message):
    done = gpu_check(*arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def precision(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import precision

    return precision


def test_precisions_are_compared_over_seeds(precision, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(sys, "argv", ["precision.py", "--quick", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        precision.main()
    assert not stopped.value.code
    result, table = json.loads((tmp_path / "precision.json").read_text()), (tmp_path / "precision.md").read_text()
    rows = result["rows"]
    named = [(row["precision"], row["seed"]) for row in rows]
    assert named == [("bf16", 0), ("fp32", 0), ("bf16", 1), ("fp32", 1)]
    assert len({row["total"] for row in rows}) == 4  # every seed and every precision is a training of its own
    for row, other in zip(rows[::2], rows[1::2], strict=True):
        assert row["total"] == pytest.approx(other["total"], rel=0.05)  # from the same weights and batches
        terms = row["discriminative"] + 0.2 * (row["snippet"] + row["video"])
        assert row["total"] == pytest.approx(terms) and row["video"] > 0  # L_D came on
    assert [x["measure"] for x in result["comparisons"]] == ["map", "average", "total", "discriminative"]
    means = [sum(row["map"] for row in rows if row["precision"] == p) / 2 for p in ("bf16", "fp32")]
    assert result["comparisons"][0]["difference"] == pytest.approx(means[0] - means[1])
    assert f"| mAP@0.5 | bf16 | {rows[0]['map']:.1f} | {rows[2]['map']:.1f} | {means[0]:.1f} |" in table
    assert "by more than the spread of seeds" in table.lower()


@pytest.mark.parametrize(
    ("a", "differ"),
    [([12.2, 13.2, 14.2], False), ([12.3, 13.3, 14.3], True), ([7.7, 8.7, 9.7], True), ([10, 11, 12], False)],
)
def test_the_spread_of_seeds(precision, a, differ):
    found = precision.compare(a, [10, 11, 12])  # standard deviation 1 in both; t of 4 degrees is 2.776
    assert found["pooled"] == pytest.approx(1) and found["spread"] == pytest.approx(2.776 * (2 / 3) ** 0.5, abs=1e-3)
    assert found["differ"] is differ and found["difference"] == pytest.approx(sum(a) / 3 - 11)


def trainings(**of: list) -> list[dict]:
    """Rows with these values in every measure, one a seed; None: failed."""
    numbers = ("map", "average", "total", "discriminative", "snippet", "video", "train_seconds", "judge_seconds")
    return [
        {"precision": name, "seed": seed} | ({"failed": "out | of luck"} if x is None else dict.fromkeys(numbers, x))
        for name, values in of.items()
        for seed, x in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (trainings(bf16=[50, 51], tf32=[40, 50], fp32=[50, 51]), "No mean differs from that of fp32 by more"),
        (trainings(bf16=[30, 31], tf32=[50, 51], fp32=[50, 51]), "differ from fp32: mAP@0.5 in bf16, average mAP in"),
        (trainings(bf16=[95, 95], fp32=[95, 95]), "This tells little: mAP@0.5 in fp32 is 95.0"),
        (trainings(bf16=[50, 51], fp32=[50, None]), "Nothing to compare: fp32 and another precision need two"),
        (trainings(bf16=[50, 51], fp32=[50, None]), "fp32, seed 1: out / of luck."),
        (trainings(bf16=[None, None], fp32=[50, 51]), "| mAP@0.5 | bf16 | - | - | - | - |"),
    ],
)
def test_what_is_said_of_precisions(precision, rows, said):
    where = {"device": "cpu", "processor": "", "threads": 1, "torch": "", "commit": "", "date": ""}
    compared = precision.comparisons(rows)
    result = {"title": "", "sizes": "", "environment": where, "rows": rows, "comparisons": compared}
    assert said in precision.markdown(result)


def test_one_seed_has_no_spread(precision, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["precision.py", "--seeds", "1"])
    with pytest.raises(SystemExit):
        precision.main()
    assert "--seeds 1: a spread needs 2 or more" in capsys.readouterr().err
