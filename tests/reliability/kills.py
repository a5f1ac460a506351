"""Kills d2net at random moments and at full disks, and looks at what is left: nothing lost, nothing half, nothing over.

    python tests/reliability/kills.py --number 100 --seed 0 --json kills.json

``train``, ``convert`` and ``localize`` each run into an empty place and over an earlier result (``train --resume``: of
half its iterations), and are ended

- ``time``: at moments drawn uniformly from the time that an undisturbed run takes from its first change of a file to
  its end, by SIGKILL, one in ten by SIGTERM and one in ten by SIGINT; moments that come too late are drawn again;
- ``change``: by SIGKILL right before each change that Python makes to a file or folder, as opening one for writing,
  renaming or removing it;
- ``full``: not at all, but no file can grow above so many bytes (RLIMIT_FSIZE): writing fails in the middle of a file,
  as on a full disk.

After each, what must hold is checked (``after_the_blow``), the command is given again, as a user would
(``train --resume`` where there is a checkpoint), and the end must be that of an undisturbed run: the same tensors, the
same bytes, and no file or folder of another name anywhere.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import children
import small_data

TRAINING = [*small_data.RECIPE, *("--set", "training.iterations=40", "--save-every", "4")]
HALF = ["training.iterations=20" if x == "training.iterations=40" else x for x in TRAINING]
# Enough to find something: what is compared must not be empty.
QUICK = [*small_data.RECIPE, *("--set", "training.iterations=60", "--set", "training.learning_rate=0.02")]
QUICK += ["--set", "model.dropout=0", "--set", "training.ema_decay=0", "--set", "loss.alpha_video=0"]


@dataclass
class Attack:
    """A command in a folder of its own, run again and again from the same beginning.

    Attributes:
        name: Of the command and what it begins with.
        beginning: The folder before.
        arguments: The command.
        result: What it writes, below the folder: a file, or a folder.
        end: The folder after an undisturbed run.
        seconds: That such a run takes from its first change of a file on.
        changes: That such a run makes to files and folders.
    """

    name: str
    beginning: Path
    arguments: list[str]
    result: str
    end: Path = field(default=Path())
    seconds: float = 0.0
    changes: int = 0

    @property
    def trains(self) -> bool:
        return self.arguments[0] == "train"

    def run(self, place: Path, again: bool = False, **how) -> children.Outcome:
        """The command in ``place``; ``again``, as a user gives it after a break."""
        arguments = [a.replace("HERE", str(place)) for a in self.arguments]
        if again and self.trains:
            arguments = [a for a in arguments if a != "--resume"]
            if (place / self.result / "checkpoint.safetensors").exists():
                arguments.append("--resume")
        return children.run(children.command(*arguments), at_work=True, **how)

    def measure(self, folder: Path) -> None:
        times = []
        for i in range(3):
            # Always at the same path: a conversion says where its source lies.
            place = begin(self, folder)
            outcome = self.run(place, changes=folder / "changes")
            if outcome.code != 0:
                raise SystemExit(f"{self.name}: fails undisturbed: {outcome.stderr}")
            times.append(outcome.seconds)
            self.changes = (folder / "changes").stat().st_size
            self.end = folder / f"end of {self.name}"
            if i == 0:
                shutil.copytree(place, self.end)
            elif difference := compare(self, place):
                raise SystemExit(f"{self.name}: two undisturbed runs differ: {difference}")
        self.seconds = sorted(times)[1]


def begin(attack: Attack, folder: Path) -> Path:
    place = folder / "place"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(attack.beginning, place)
    return place


def attacks(folder: Path) -> list[Attack]:
    """Each command, into an empty place and over what lay there."""

    def prepared(name: str, *commands: list[str], scale: float = 1.0) -> Path:
        """A folder with data, and with what these commands make of it, features ``scale`` times larger."""
        place = folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        small_data.cola(place / "data", scale)
        for command in commands:
            outcome = children.run(children.command(*(a.replace("HERE", str(place)) for a in command)))
            if outcome.code != 0:
                raise SystemExit(f"{name}: cannot be prepared: {outcome.stderr}")
        small_data.cola(place / "other-data")
        shutil.rmtree(place / "data")
        (place / "other-data").rename(place / "data")
        return place.rename(folder / name)

    data, out = ["--data", "HERE/data"], "HERE/out/result"
    train = ["train", *data, "--out", out, *TRAINING]
    half = ["train", *data, "--out", out, *HALF]
    model = ["train", *data, "--out", "HERE/model", *QUICK]
    localize = ["localize", "HERE/model", *data, "--device", "cpu", "--out", f"{out}.json"]
    earlier = [*localize, "--set", "localization.thresholds=[0.2]"]
    convert = ["convert", "HERE/data", out]
    return [
        Attack("train", prepared("1"), train, "out/result"),
        Attack("train --resume", prepared("2", half), [*train, "--resume"], "out/result"),
        Attack("convert", prepared("3"), convert, "out/result"),
        Attack("convert over an earlier one", prepared("4", convert, scale=2.0), convert, "out/result"),
        Attack("localize", prepared("5", model), localize, "out/result.json"),
        Attack("localize over earlier ones", prepared("6", model, earlier), localize, "out/result.json"),
    ]


def content(place: Path) -> dict[str, bytes] | bytes | None:
    """Of a file, of all files of a folder, or None where there is nothing."""
    if place.is_dir():
        return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}
    return place.read_bytes() if place.exists() else None


def names(place: Path) -> set[str]:
    """All there is below a folder; TensorBoard names its files after the time."""
    return {str(p.relative_to(place)) for p in place.rglob("*") if "tensorboard" not in p.parts}


def some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def tensors(path: Path) -> dict[str, tuple]:
    from safetensors.numpy import load_file

    return {key: (x.dtype, x.shape, x.tobytes()) for key, x in load_file(path).items()}


def log_lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def entries(path: Path) -> list[dict]:
    """Of a log: lines of numbers, not those that say where a run went on, nor one that a full disk has cut."""
    found = []
    for line in log_lines(path):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in found if "iteration" in entry]


def after_the_blow(attack: Attack, place: Path, full: bool) -> str:
    """What is wrong with what is left; empty where nothing is, "gone" where an earlier result lies beside its place."""
    earlier, whole = (content(folder / attack.result) for folder in (attack.beginning, attack.end))
    if not attack.trains:
        left = content(place / attack.result)
        if left in (earlier, whole):
            return ""
        if left is not None:
            return "half a result lies there"
        # A folder that is exchanged lies beside its place for a moment; the next command must find it there.
        folder = (place / attack.result).parent
        beside = [content(path) for path in folder.iterdir()] if folder.is_dir() else []
        return "gone" if earlier in beside else "the earlier result is nowhere"
    from d2net.checkpoint import load_checkpoint
    from d2net.errors import D2NetError

    out = place / attack.result
    if (out / "checkpoint.safetensors").exists():
        try:
            load_checkpoint(out)
        except D2NetError as error:
            return f"the checkpoint cannot be loaded: {error}"
    elif (attack.beginning / attack.result).exists():
        return "the earlier checkpoint is lost"
    if (out / "checkpoint.json").exists():
        try:
            json.loads((out / "checkpoint.json").read_bytes())
        except ValueError as error:
            return f"checkpoint.json: {error}"
    before, after = (log_lines(folder / attack.result / "log.jsonl") for folder in (attack.beginning, place))
    if after[: len(before)] != before:
        return f"{len(before)} lines of the log were there, now {len(after)} are: earlier ones are lost"
    try:
        # A disk that fills up may cut the last line; a process that ends may not.
        for line in after[:-1] if full and after and not after[-1].endswith(b"\n") else after:
            json.loads(line)
    except ValueError as error:
        return f"a line of the log is no JSON: {error}"
    return ""


def compare(attack: Attack, place: Path, full: bool = False) -> str:
    """In what the folder differs from that after an undisturbed run; empty where in nothing.

    Args:
        full: The disk was full: the log then has a gap, which the command has said.
    """
    if extra := names(place) - names(attack.end):
        return f"left over: {some(extra)}"
    if missing := names(attack.end) - names(place):
        return f"missing: {some(missing)}"
    if not attack.trains:
        same = content(place / attack.result) == content(attack.end / attack.result)
        return "" if same else "another result than undisturbed"
    if tensors(place / attack.result / "checkpoint.safetensors") != tensors(
        attack.end / attack.result / "checkpoint.safetensors"
    ):
        return "other tensors than undisturbed"
    logged, wanted = (
        {entry["iteration"] for entry in entries(folder / attack.result / "log.jsonl")}
        for folder in (place, attack.end)
    )
    return "" if full or logged >= wanted else f"the log lacks iterations {sorted(wanted - logged)}"


def strike(attack: Attack, folder: Path, found: Counter, say, **how) -> None:
    """One run that is disturbed, what it leaves, and the run after it."""
    place = begin(attack, folder)
    outcome = attack.run(place, **how)
    found["runs"] += 1
    found["went through"] += outcome.code == 0
    problems = []
    if outcome.traceback:
        problems.append(("traceback", f"prints a traceback: {outcome.stderr.strip().splitlines()[-1]}"))
    if outcome.late:
        problems.append(("hung", "did not end"))
    full = "file_size" in how
    if outcome.code not in ((0, 2) if full else ENDS):
        problems.append(("traceback", f"ends with exit code {outcome.code}: {outcome.stderr[-200:]}"))
    wrong = after_the_blow(attack, place, full)
    if wrong == "gone":
        found["earlier result not at its place"] += 1
    elif wrong:
        problems.append(("lost", wrong))
    if full and outcome.code != 0 and (extra := names(place) - names(attack.beginning) - names(attack.end)):
        problems.append(("litter", f"left over by an error: {some(extra)}"))
    again = attack.run(place, again=True)
    if again.code != 0:
        problems.append(("no way on", f"cannot go on, exit code {again.code}: {again.stderr.strip()[-300:]}"))
    else:
        different = compare(attack, place, full)
        if different:
            problems.append(("litter" if different.startswith("left over") else "different", different))
    for kind, text in problems:
        found[kind] += 1
        say(f"{attack.name}, {', '.join(f'{k} {v}' for k, v in how.items())}: {text}".replace(str(folder), ""))


ENDS = (0, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)  # exit codes of what is done, or was ended
FAILURES = ("lost", "no way on", "different", "litter", "traceback", "hung")
WAYS = ("time", "change", "full")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=100, help="of each command and way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="attacks whose name contains this")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    children.import_all()
    random_number = random.Random(given.seed)
    table: dict[str, dict[str, dict[str, int]]] = {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="d2net-kills-") as name:
        folder = Path(name)
        for attack in attacks(folder):
            if given.only not in attack.name:
                continue
            attack.measure(folder)
            largest = max(p.stat().st_size for p in (attack.end / "out").rglob("*") if p.is_file())
            number = -(-given.number // 2)  # two attacks a command
            ways: dict[str, list[dict]] = {way: [] for way in WAYS}
            for i in range(5 * number):
                kind = {8: signal.SIGTERM, 9: signal.SIGINT}.get(i % 10, signal.SIGKILL)
                ways["time"].append({"blow": (kind, random_number.uniform(0, attack.seconds))})
            for i in range(number):
                size = int(largest ** random_number.random() if i % 2 else random_number.uniform(0, largest))
                ways["full"].append({"file_size": size})
            every = range(1, attack.changes + 1)
            ways["change"] = [
                {"before_change": n} for n in sorted(random_number.sample(every, min(number, len(every))))
            ]
            table[attack.name] = {}
            for way in given.ways.split(","):
                found: Counter = Counter(dict.fromkeys(("runs", "went through", *FAILURES), 0))
                for how in ways[way]:
                    if found["runs"] - found["went through"] == number:  # so many were ended
                        break
                    strike(attack, folder, found, problems.append, **how)
                table[attack.name][way] = dict(found)
                print(f"{attack.name} ({attack.seconds:.2f} s), {way}: {dict(found)}", flush=True)
    for problem in problems[:60]:
        print(f"  {problem}")
    if given.json:
        figures = {**children.environment(), "seed": given.seed, "attacks": table, "problems": problems}
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    failed = sum(found[kind] for ways in table.values() for found in ways.values() for kind in FAILURES)
    print(f"{sum(f['runs'] for w in table.values() for f in w.values())} runs, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
