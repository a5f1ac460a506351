"""What pages and help texts say of commands, options, settings, files, tests and defaults is so in the code."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from d2net.cli import app, evaluate, features, plot, predict, train
from d2net.data.watch import HOP, RATE, STREAM_WIDTH, TILT, TRAIN_SUBJECTS, WINDOW, load_watch
from d2net.evaluation import THUMOS14_TIOU
from d2net.features import sensor_method, video_method
from d2net.recipes import load_recipe
from d2net.report.page.recordings import MOST_DETECTIONS, MOST_POINTS
from d2net.report.timeline import MIN_SCORE
from d2net.report.timeline.rows import MAX_CLASSES
from d2net.studies.ablation.plan import RECORDINGS
from d2net.training import Trainer
from d2net.training.loop import SAVE_EVERY, SAVE_SECONDS
from d2net.training.terms import CHECK_EVERY

ROOT = Path(__file__).parents[1]
PAGES = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in ROOT.glob("docs/*.md")}
PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = "".join(
    p.read_text(encoding="utf-8")
    for glob in ("benchmarks/*", "tests/reliability/*.py")
    for p in ROOT.glob(glob)
    if p.is_file()
)
TORCHRUN = {"--nproc-per-node", "--nnodes", "--standalone", "--max-restarts"}
TORCHRUN |= {"--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
SLURM = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"}
OTHERS_FLAGS = {"--no-deps", "--activity-net", *TORCHRUN, *SLURM}  # of pip and the released code, too

everywhere = pytest.mark.parametrize("page", PAGES)


def commands(command: Any = None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command by its words, ``("study", "ablation")``."""
    command = command or typer.main.get_command(app)
    found = {path: command}
    for name, each in getattr(command, "commands", {}).items():
        found |= commands(each, (*path, name))
    return found


COMMANDS = commands()
FLAGS = {
    words: {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
    for words, command in COMMANDS.items()
}


def default(function: Any, argument: str) -> Any:
    return inspect.signature(function).parameters[argument].default


def lines_of_code(text: str) -> list[str]:
    """The lines of all blocks of code, and what stands in backticks."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", rest)]
    return [*(line for block in blocks for line in block.replace("\\\n", " ").splitlines()), *spans]


# --- Help texts -------------------------------------------------------------------------------------------------------

# The numbers that a help text gives as a default, with where the code has them. Recipes' numbers never stand there.
STATED = {
    ("train", "seed"): [0],
    ("train", "save_every"): [SAVE_EVERY, SAVE_SECONDS],
    ("features", "fps"): [default(video_method, "fps"), default(sensor_method, "fps")],
    ("features", "window"): [default(video_method, "window"), default(sensor_method, "window")],
    **{(" ".join(words), "offset"): [0] for words, flags in FLAGS.items() if "--offset" in flags},
}


def test_a_help_text_gives_no_default_that_the_code_has_not():
    """``d2net demo --help`` once said 600 iterations where the recipe had 1200."""
    found = {}
    for words, command in COMMANDS.items():
        for parameter in command.params:
            text = re.search(r"default:? (.*)", getattr(parameter, "help", None) or "", re.IGNORECASE)
            numbers = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])", text[1]) if text else []
            if numbers:
                found[" ".join(words), parameter.name] = [float(n) for n in numbers]
    assert found == STATED


@pytest.mark.parametrize(
    ("command", "option", "expected"),
    [
        (train.train, "save_every", default(Trainer, "save_every")),
        (train.train, "eval_every", default(Trainer, "eval_every")),
        (plot.plot, "min_score", MIN_SCORE),
        (evaluate.evaluate, "tiou", f"{THUMOS14_TIOU[0]:g}:{THUMOS14_TIOU[-1]:g}:0.1"),
        (features.features, "stride", default(video_method, "stride")),
        (features.features, "stride", default(sensor_method, "stride")),
        *((features.features, name, default(video_method, name)) for name in ("extractor", "batch", "precision")),
        (predict.predict, "batch", default(video_method, "batch")),
    ],
)
def test_a_command_and_its_function_have_the_same_default(command, option, expected):
    assert default(command, option) == expected


def test_numbers_that_stand_twice():
    assert default(load_watch, "train_recordings") == RECORDINGS
    assert [default(sensor_method, name) for name in ("fps", "window", "stride")] == [RATE, WINDOW, HOP]


# --- Pages ------------------------------------------------------------------------------------------------------------


@everywhere
def test_commands_and_their_options(page):
    wrong = []
    for line in lines_of_code(PAGES[page]):
        for match in re.finditer(r"(?:^|&& |\| |; )d2net((?: [a-z][a-z-]*)+)(.*?)(?=$| && | \| |#)", line):
            words: tuple[str, ...] = ()
            for word in match[1].split():
                if (*words, word) not in COMMANDS:
                    break
                words += (word,)
            flags = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", match[2]))
            if not words or not flags <= FLAGS[words]:
                wrong.append(line)
    assert not wrong


@everywhere
def test_options_without_their_command(page):
    known = set().union(*FLAGS.values(), OTHERS_FLAGS)
    found = {flag for line in lines_of_code(PAGES[page]) for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
    assert not [flag for flag in found - known if flag not in SCRIPTS]


@everywhere
def test_settings(page):
    table: dict[str, Any] = load_recipe("watch").to_dict()
    table["watch"] = inspect.signature(load_watch).parameters
    settings = re.findall(
        r"(?<![\w./])(model|loss|training|localization|evaluation|watch)\.([a-z_]+)(?=[=`, ])",
        "\n".join(f"{line} " for line in lines_of_code(PAGES[page])),
    )
    # Attributes of the network, of the released one, and of the loss.
    tensors = {("model", "x_ref"), ("model", "running_bg"), ("loss", "reference")}
    assert not [s for s in settings if s[1] not in table[s[0]] and s not in tensors]


@everywhere
def test_files_and_names(page):
    text, wrong = "\n".join(lines_of_code(PAGES[page])), []
    for path in re.findall(r"(?<![\w/.~-])((?:d2net|csrc|tests|benchmarks|examples)/[\w./*-]*\w)", text):
        if "NAME" not in path and not any(ROOT.glob(path)):
            wrong.append(path)
    for name in re.findall(r"(?<![\w./])d2net(?:\.\w+)+(?=\(|`|\n| |,)", text):
        if name.endswith("_simt") or ".ops.d2net" in name:  # built by the tests
            continue
        *owner, last = name.split(".")
        try:
            importlib.import_module(name)
        except ImportError:
            module = importlib.import_module(".".join(owner)) if owner else None
            if not hasattr(module, last):
                wrong.append(name)
    assert not wrong


@everywhere
def test_tests(page):
    wrong, file = [], ""
    for named, test in re.findall(r"`((?:[\w/]+\.py)?)::(\w+)`", PAGES[page]):
        file = named or file
        path = ROOT / file if file.startswith("tests/") else ROOT / "tests" / file
        if not path.is_file() or f"def {test}(" not in path.read_text(encoding="utf-8"):
            wrong.append(f"{file}::{test}")
    assert not wrong


@everywhere
def test_links(page):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists():
            wrong.append(link)
        elif anchor:
            text = re.sub(r"```.*?```", "", target.read_text(encoding="utf-8"), flags=re.DOTALL)
            titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            wrong += [link] if anchor not in anchors else []
    assert not wrong


watch, generic = load_recipe("watch"), load_recipe("generic")
test_people, people = len(default(load_watch, "test_subjects")), len(TRAIN_SUBJECTS)
SAID = [
    ("README.md", f"trains on {default(load_watch, 'train_recordings')} recordings of a smartwatch"),
    ("README.md", f"the exercises in {default(load_watch, 'test_recordings')} recordings of people it has not seen"),
    ("docs/demo.md", f"the loss every {CHECK_EVERY} iterations"),
    ("docs/demo.md", f"There are {default(load_watch, 'train_recordings')} training recordings"),
    ("docs/demo.md", f"({TILT:g} degrees standard deviation about each)"),
    ("docs/demo.md", f"(0.82 to {np.exp(default(load_watch, 'tempo')):.2f} in two of three)"),
    ("docs/demo.md", f"Features are {STREAM_WIDTH} plain statistics of {WINDOW / RATE:g} s windows per sensor"),
    ("docs/demo.md", f"People 1-{people} train, {people + 1}-{people + test_people} test"),
    ("docs/demo.md", f"dropout {watch.model.dropout:g}, {watch.training.iterations} iterations"),
    ("docs/demo.md", f"{watch.training.ema_decay:g}^{watch.training.iterations} = 9 %"),
    (
        "docs/own-data.md",
        f"embedding {generic.model.embedding_dim} wide, L_Dis alone, dropout {generic.model.dropout:g}, "
        f"{generic.training.iterations} iterations, learning rate 1e-3, average of the weights "
        f"(EMA {generic.training.ema_decay:g})",
    ),
    (
        "docs/own-data.md",
        f"Recordings are cropped to {generic.training.max_snippets} snippets, as in the released code",
    ),
    ("docs/fidelity.md", f"of more than {load_recipe('thumos14-paper').training.max_snippets} snippets"),
    ("docs/gpu.md", f"saves every {SAVE_EVERY} iterations by default, but not twice within {SAVE_SECONDS} seconds"),
    ("docs/gpu.md", f"(`--total`, {re.search(r'^total=([0-9]+)', SCRIPTS, re.MULTILINE)[1]} s by default)"),
    ("docs/plots.md", f"`--min-score SHARE` ({MIN_SCORE:g})"),
    (
        "docs/report.md",
        f"the {MOST_DETECTIONS} highest detections are drawn, and curves of more than {MOST_POINTS:,} snippets",
    ),
    ("docs/features.md", f"`--fps {default(video_method, 'fps'):g} --window {default(video_method, 'window')}"),
    ("docs/features.md", f"--stride {default(video_method, 'stride')}`"),
    ("docs/features.md", f"`--batch {default(video_method, 'batch')}`"),
    ("docs/features.md", f"brought to {default(sensor_method, 'fps'):g} samples a second (`--fps`)"),
    ("docs/features.md", f"(`--window {default(sensor_method, 'window')}`)"),
]


@pytest.mark.parametrize(("page", "words"), SAID)
def test_a_number_of_a_page_is_that_of_the_code(page, words):
    assert words in re.sub(r"\s+", " ", PAGES[page])


MEASURED = [  # a row of the README's table, the file of results, its case, and whose times stand there
    ("L_Dis + L_D, B=10", "loss", "B=10 T=750 C=20 D=1024", ("PyTorch, batched",)),
    ("`topk_pool`, (10, 750, 20)", "topk_pool", "B=10 T=750 C=20", ("PyTorch",)),
    ("`extract_proposals`", "extract_proposals", "212 test videos, classes above half the best", ("PyTorch", "numpy")),
    ("`nms_1d`", "nms_1d", "nms random 20000 in 200 s", ("numpy", "C++ O(n^2)")),
    ("mAP of 14,000", "evaluation", "14000 detections", ("published way (pandas)",)),
]


@pytest.mark.parametrize(("work", "file", "case", "others"), MEASURED)
def test_the_measured_table_is_of_the_results(work, file, case, others):
    (row,) = re.findall(rf"^\| CPU \| {re.escape(work)}.*$", PAGES["README.md"], re.MULTILINE)
    results = (ROOT / "benchmarks" / "results" / "cpu" / f"{file}.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.splitlines() if line.startswith("| ")]
    times = {c[1]: float(c[2]) for c in reversed(cells[1:]) if c[0].startswith(case)}  # of two such cases the first
    said = [float(x) for x in re.findall(r"([\d.]+) ms", row)]
    assert said == pytest.approx([times[name] for name in ("d2net", *others)], rel=0.03)
    assert row.split("|")[5].strip() in results.splitlines()[2]


def test_what_the_recipes_leave_to_others():
    assert generic.training.learning_rate == 1e-3 and not generic.loss.alpha_snippet and not generic.loss.alpha_video
    assert MAX_CLASSES == 5 and "At most five classes of a recording are drawn" in PAGES["docs/plots.md"]


def test_crops_and_shares_of_thumos14(shared):
    """What docs/fidelity.md says of real videos, from the annotations of the 200 that are trained on."""
    folder = shared / "data" / "thumos14" / "wtalc"
    names = ("videoname", "subset", "duration", "segments", "labels")
    columns = [np.load(folder / f"{name}.npy", allow_pickle=True) for name in names]
    crop, shares, long, blind = load_recipe("thumos14-paper").training.max_snippets, [], 0, {}
    for name, subset, duration, segments, labels in zip(*columns, strict=True):
        if subset not in ("validation", b"validation"):
            continue
        snippets = int(float(duration[0]) * 25 / 16)
        action = np.zeros(snippets, bool)
        starts = np.arange(max(0, snippets - crop) + 1)
        seen = {label: np.zeros(len(starts), bool) for label in labels}
        for (start, end), label in zip(np.array(segments, float) * 25 / 16, labels, strict=True):
            action[round(start) : round(end)] = True
            seen[label] |= (starts < end) & (starts + crop > start)
        shares.append(action.mean())
        long += snippets > crop
        without = 1 - np.all(list(seen.values()), 0).mean()
        if without > 0:
            blind[name if isinstance(name, str) else name.decode()] = without
    page = re.sub(r"\s+", " ", PAGES["docs/fidelity.md"])
    assert f"Of THUMOS14's {len(shares)} training videos, {long} are longer" in page
    ((video, share),) = blind.items()
    assert f"(`{video}`) {100 * share:.0f} % of the crops have no segment" in page
    assert f"actions cover less than {100 * np.median(shares):.0f} % of the time" in page
    assert f"in {100 * np.mean(np.array(shares) < 0.5):.0f} % less than half" in page
