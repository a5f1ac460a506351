"""What a report says of how its numbers came about; and ``run.json``, in which a run's folder says what made it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import d2net
from d2net.checkpoint import Checkpoint
from d2net.data.dataset import Dataset
from d2net.errors import InputError
from d2net.files import write_whole
from d2net.reading import read_json, typed
from d2net.recipes import Recipe, differences, load_recipe, recipe_names
from d2net.words import counted

RUN_NAME = "run.json"
Facts = list[tuple[str, str]]  # name, text


@dataclass(frozen=True)
class RunRecord:
    """What made a run, for a later report of it.

    Attributes:
        command: As it was typed; "" for a training from Python.
        data: What ``--data`` was.
        options: What else was said about the data, as :class:`d2net.cli.options.DataOptions` has it.
        test: Subsets that were judged on; empty: none.
        began: When it began, in ISO 8601.
        ended: When it ended.
        source: The d2net that ran (:func:`source`).
    """

    command: str
    data: str
    options: Mapping[str, Any] = field(default_factory=dict)
    test: Sequence[str] = ()
    began: str = field(default_factory=lambda: now())
    ended: str = ""
    source: str = field(default_factory=lambda: source())

    def write(self, out: Path) -> RunRecord:
        """The record of a run that ends now, into its folder. Raises InputError where that cannot be written."""
        ended = replace(self, ended=now())
        write_whole(out / RUN_NAME, json.dumps(asdict(ended), indent=1) + "\n")
        return ended


def read_record(run: Path) -> RunRecord | None:
    """What a run's folder says of it, or None where it does not. Raises InputError for a file that is none of ours."""
    path = run / RUN_NAME
    if not path.exists():
        return None
    found = read_json(path)
    where = f"{path}: not written by d2net: "
    texts = {
        name: typed(found.get(name), str, f"{where}'{name}'")
        for name in ("command", "data", "began", "ended", "source")
    }
    options = typed(found.get("options"), dict, f"{where}'options'")
    test = [typed(name, str, f"{where}a subset") for name in typed(found.get("test"), list, f"{where}'test'")]
    if unknown := set(found) - {f.name for f in fields(RunRecord)}:
        raise InputError(f"{where}it has '{sorted(unknown)[0]}'; remove it, and name what it would say: --data")
    return RunRecord(**texts, options=options, test=test)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def source() -> str:
    """Version of d2net, and its commit where it runs from a git checkout."""
    package = Path(d2net.__file__).resolve().parent
    text = f"d2net {d2net.__version__}"
    if not (package.parent / ".git").exists():
        return text
    try:
        git = ["git", "-C", str(package)]
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, timeout=10, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that it does not read
        return text
    return f"{text}, commit {commit.stdout.decode().strip()}{', with changes' * bool(changed.stdout.strip())}"


def recipe_fact(recipe: Recipe) -> tuple[str, str]:
    """Its name, and every setting that is not as the recipe of that name has it."""
    if recipe.name not in recipe_names():
        return "recipe", f"{recipe.name}, which is none of d2net's"
    changed = differences([load_recipe(recipe.name), recipe])
    lines = [f"{key} = {_plain(values[1])} (in the recipe {_plain(values[0])})" for key, values in changed]
    return "recipe", "\n".join(
        [f"{recipe.name}, " + (f"but {counted(len(lines), 'setting')}:" if lines else "unchanged"), *lines]
    )


def data_facts(dataset: Dataset) -> Facts:
    """What a report's recordings are."""
    left_out = f"; {counted(len(dataset.left_out), 'recording')} left out" if dataset.left_out else ""
    subsets = ", ".join(dataset.subsets)
    lines = [f"{dataset.name}: {counted(len(dataset), 'recording')}{f' ({subsets})' if subsets else ''}{left_out}"]
    if dataset.source and dataset.source != dataset.name:
        lines.append(dataset.source)
    widths = " + ".join(map(str, dataset.stream_widths))
    return [("data", "\n".join([*lines, *dataset.notes])), ("features", f"width {widths}")]


def run_facts(checkpoint: Checkpoint, record: RunRecord | None = None) -> Facts:
    """How a checkpoint was trained."""
    where = f"CPU, {counted(checkpoint.threads, 'thread')}" if checkpoint.threads else "GPU, or not known"
    facts = [
        recipe_fact(checkpoint.recipe),
        ("trained", f"{checkpoint.iteration} iterations on {checkpoint.dataset}, seed {checkpoint.seed}"),
        ("computed in", f"{checkpoint.precision or 'precision not known'}, {where}"),
        ("trained by", record.source if record else f"d2net {checkpoint.version}"),
    ]
    if record:
        facts += [("command", record.command or "from Python"), ("time", _time(record))]
    return facts


def report_facts(command: str = "") -> Facts:
    """Who made a report, and when."""
    return [("report", "\n".join(filter(None, [f"{source()}, {_date(now())}", command])))]


def _time(record: RunRecord) -> str:
    try:
        took = datetime.fromisoformat(record.ended) - datetime.fromisoformat(record.began)
    except (ValueError, TypeError):  # no such times
        return f"from {record.began} to {record.ended}"
    return f"{_date(record.began)}, took {took}"


def _date(iso: str) -> str:
    return iso.replace("T", " ").replace("+00:00", " UTC")


def _plain(value: object) -> str:
    return "–" if value is None else json.dumps(value) if isinstance(value, (tuple, list, bool)) else str(value)
