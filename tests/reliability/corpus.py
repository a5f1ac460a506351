"""Damages files of every kind that d2net reads, has a command read each, and counts what comes of it.

    python tests/reliability/corpus.py --number 100 --seed 0 --json corpus.json

The command runs in a child with 20 seconds and 2 GiB. What came of it is, by the first that is true:

- ``crash``, ``hang``, ``traceback``: it was ended by a signal, did not end, or Python's traceback was printed;
- ``written elsewhere``: a file or folder outside the output appeared, changed or went;
- ``unclean``: an exit code other than those of d2net, more than one line of error, one of over 2,000 characters, or
  anything that could move a terminal's cursor, on either stream;
- ``clean error``: exit code 2 and one line that begins with ``error:``, after notes and progress alone;
- ``same result``: exit code 0, and output and files are, byte for byte, those that the undamaged file gives;
- ``other, and says so``: the result is another, and a note or finding is there that the undamaged file does not give;
- ``valid but another input``: the result is another, and the damaged file is one by the documents, which
  ``documented.py`` judges without d2net: another number, name or row, or other values of features. These formats
  have no checksum: nobody can tell;
- ``silently other``: the rest. So is every other result of a damaged checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import children
import damage
import documented
import small_data

SECONDS, MEMORY = 20, 2 << 30
LONGEST = 2000 + len("error: ")  # of a line: what d2net/words.py promises of a message
BAD = ("crash", "hang", "traceback", "written elsewhere", "unclean", "silently other")
REMARKS = ("note: ", "left out: ", "  ")
GOOD = ("clean error", "same result", "other, and says so", "valid but another input")
TRAINED = [*small_data.RECIPE, *("--set", "training.learning_rate=0.02", "--set", "training.ema_decay=0.9")]
TRAINED += ["--set", "model.dropout=0", "--set", "loss.alpha_video=0", "--save-every", "20"]


def of_length(number: int) -> list[str]:
    return ["--set", f"training.iterations={number}"]


@dataclass(frozen=True)
class Kind:
    """A kind of file, and the command that reads it.

    Attributes:
        files: Below ``HERE``; one of them is damaged at a time.
        command: That reads them, with HERE for the folder; OUT is what it may write.
        odd: Ways of damaging it that know its format.
        documented: Raises where a file is none by the documents; None: it has a checksum, and is never another.
        ends: Exit codes that are no error. ``inspect`` ends with 1 where it has found something.
        instead: Whether something else may lie in its place.
        optional: Whether the file may be absent.
    """

    name: str
    files: tuple[str, ...]
    command: tuple[str, ...]
    odd: tuple[Callable[[random.Random, bytes, bytes], damage.Damaged], ...] = ()
    documented: Callable[[Path], None] | None = None
    ends: tuple[int, ...] = (0,)
    instead: bool = True
    optional: bool = False


def kinds(place: Path) -> list[Kind]:
    """All kinds, with the folder that they lie in."""
    made: list[list[str]] = []

    def have(*arguments: str) -> None:
        made.append(list(arguments))

    small_data.cola(place / "cola")
    for suffix in (".npy", ".npz", ".pt", ".h5"):
        small_data.actionformer(place / f"af{suffix}", suffix)
    small_data.bmn(place / "bmn")
    small_data.wtalc(place / "wtalc")
    for suffix in (".json", ".csv"):
        small_data.detections(place / f"detections{suffix}")
    _frames(place / "frames")
    (place / "settings.txt").write_text(
        "training.learning_rate=1.0e-3\nloss.beta=2\nmodel.dropout=0.5\nloss.threshold=0.5\ntraining.ema_decay=0.9\n"
        "localization.thresholds=[0.1, 0.2]\nloss.pairing=different\nloss.momentum=0.9\n"
    )
    have("train", "--data", "HERE/cola", "--out", "HERE/run", *TRAINED, *of_length(40))
    have("train", "--data", "HERE/cola", "--out", "HERE/half", *TRAINED, *of_length(20))
    ablation = ("study", "ablation", "--data", "HERE/cola", "--recipe", "watch", "--losses", "focal", "--seeds", "1")
    ablation += ("--device", "cpu", *of_length(2), "--set", "model.embedding_dim=4", "--set", "training.batch_size=4")
    ablation += ("--out", "HERE/study")
    have(*ablation)
    for command in made:
        outcome = children.run(children.command(*(a.replace("HERE", str(place)) for a in command)))
        if outcome.code != 0:
            raise SystemExit(f"cannot be prepared: {command}: {outcome.stderr[-600:]}")

    test = [name for name, (subset, _, _) in small_data.VIDEOS.items() if subset == "test"]
    localize = ("localize", "HERE/run", "--device", "cpu", "--out", "OUT/d.json", "--data")
    notes = "wtalc/Mine-Annotations"
    pickles = ("videoname", "subset", "classlist", "duration", "segments", "labels", "labels_all")
    judge = ("evaluate", "HERE/detections.json", "--json", "OUT/e.json", "--annotations")
    wtalc = ("convert", "HERE/wtalc", "OUT/c", "--trust-pickle")
    resume = ("train", "--resume", "--data", "HERE/cola", "--out", "OUT/half", *TRAINED, *of_length(24))
    odd_json, odd_npy = (damage.odd_json,) * 6, (damage.odd_npy,) * 2
    results = [str(p.relative_to(place)) for p in (place / "study").rglob("*.json") if p.name != "ablation.json"]
    return [
        Kind(
            "annotations JSON, converted",
            ("af.npy/annotations.json",),
            ("convert", "HERE/af.npy", "OUT/c"),
            odd_json,
            documented.annotations,
        ),
        Kind(
            "annotations JSON, judged by",
            ("cola/gt.json",),
            (*judge, "HERE/cola"),
            odd_json,
            documented.annotations,
        ),
        Kind(
            "annotations JSON, inspected",
            ("af.npz/annotations.json",),
            ("inspect", "HERE/af.npz"),
            odd_json,
            documented.annotations,
            (0, 1),
        ),
        Kind("annotations JSON of BMN", ("bmn/anno_test.json",), (*judge, "HERE/bmn"), odd_json, documented.bmn),
        Kind(
            "annotations JSON, simulated",
            ("cola/gt.json",),
            ("convert", "simulated:HERE/cola/gt.json", "OUT/c"),
            odd_json,
            documented.annotations,
        ),
        Kind(
            "annotations of layout 2",
            ("cola/gt.json",),
            ("convert", "HERE/cola", "OUT/c"),
            odd_json,
            documented.annotations,
        ),
        Kind(
            "split of layout 2",
            ("cola/split_train.txt", "cola/split_test.txt"),
            ("convert", "HERE/cola", "OUT/c"),
            (damage.odd_cell,) * 3,
            documented.lines,
        ),
        Kind(
            "features .npy",
            tuple(f"cola/features/test/{stream}/{name}.npy" for name in test for stream in ("rgb", "flow")),
            (*localize, "HERE/cola"),
            odd_npy,
            documented.npy,
        ),
        Kind(
            "features .npz",
            tuple(f"af.npz/features/{name}.npz" for name in test),
            (*localize, "HERE/af.npz"),
            (),
            documented.npz,
        ),
        Kind(
            "features .pt",
            tuple(f"af.pt/features/{name}.pt" for name in test),
            (*localize, "HERE/af.pt"),
            (),
            documented.torch_file,
        ),
        Kind("features .h5", ("af.h5/features/all.h5",), (*localize, "HERE/af.h5"), (), documented.h5),
        Kind(
            "pickled annotations of layout 1, trusted",
            (*(f"{notes}/{name}.npy" for name in pickles), f"{notes}/test_gt_segments.npy"),
            wtalc,
            (damage.odd_pickled_npy,) * 2,
            documented.pickled,
        ),
        Kind(
            "pickled features of layout 1, trusted",
            ("wtalc/Mine-I3D-JOINTFeatures.npy",),
            wtalc,
            (damage.odd_pickled_npy,),
            documented.pickled,
        ),
        Kind(
            "ambiguous segments of layout 1",
            (f"{notes}/Ambiguous_test.txt",),
            wtalc,
            (damage.odd_cell,) * 3,
            documented.marks,
            optional=True,
        ),
        Kind("detections JSON", ("detections.json",), (*judge, "HERE/cola"), odd_json, documented.detections),
        Kind(
            "detections CSV",
            ("detections.csv",),
            ("evaluate", "HERE/detections.csv", "--json", "OUT/e.json", "--annotations", "HERE/cola"),
            (damage.odd_cell,) * 6,
            documented.detections_csv,
        ),
        Kind(
            "checkpoint, localized with",
            ("run/checkpoint.safetensors",),
            (*localize, "HERE/cola"),
            (damage.odd_safetensors,) * 8 + (damage.unlikely_numbers,),
        ),
        Kind(
            "checkpoint, resumed",
            ("half/checkpoint.safetensors",),
            resume,
            (damage.odd_safetensors,) * 8 + (damage.unlikely_numbers,),
        ),
        Kind(
            "checkpoint, made up and signed, localized with",
            ("run/checkpoint.safetensors",),
            (*localize, "HERE/cola"),
            (damage.signed_again,) * 50,
            documented.signed_checkpoint,
            instead=False,
        ),
        Kind(
            "checkpoint, made up and signed, resumed",
            ("half/checkpoint.safetensors",),
            resume,
            (damage.signed_again,) * 50,
            documented.signed_checkpoint,
            instead=False,
        ),
        Kind("log of a run, resumed", ("half/log.jsonl",), resume, (damage.odd_json_line,) * 6),
        Kind("files of a study", tuple(results), (*ablation[:-1], "OUT/study"), odd_json, documented.study),
        Kind(
            "images of --frames",
            (f"frames/{test[0]}/1.jpg", f"frames/{test[0]}/2.jpg"),
            _plot(test[0]),
            (),
            documented.picture,
            optional=True,
        ),
        Kind(
            "settings of --set",
            ("settings.txt",),
            _train("OUT/run"),
            (damage.odd_setting,) * 8,
            documented.settings,
            instead=False,
        ),
    ]


def _plot(name: str) -> tuple[str, ...]:
    detections = ("--detections", "HERE/detections.json", "--video", name, "--frames", "HERE/frames")
    return ("plot", "--data", "HERE/cola", *detections, "--out", "OUT/p.png")


def _train(out: str) -> tuple[str, ...]:
    return ("train", "--data", "HERE/cola", "--out", out, *small_data.RECIPE, *of_length(2), "SETTINGS")


def _frames(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    name = next(name for name, (subset, _, _) in small_data.VIDEOS.items() if subset == "test")
    (folder / name).mkdir(parents=True)
    for i in range(1, 9):
        colours = np.random.default_rng(i).integers(0, 255, (6, 8, 3), np.uint8)
        Image.fromarray(colours).resize((64, 48)).save(folder / name / f"{i}.jpg")


def surroundings(folder: Path, out: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of all that lies in a folder, but for ``out``."""
    found = {}
    for base, folders, files in os.walk(folder):
        if Path(base) == out:
            folders.clear()
            continue
        for name in (*folders, *files):
            path = os.path.join(base, name)
            status = os.lstat(path)
            found[path] = (status.st_size if name in files else 0, status.st_mtime_ns if name in files else 0)
    return found


def result(kind: Kind, out: Path) -> dict[str, bytes]:
    """What a command wrote. Of a training, the tensors; of a study, its tables: the rest says where and when."""
    from safetensors.numpy import load_file

    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and "tensorboard" not in p.parts):
        name = str(path.relative_to(out))
        if path.suffix == ".safetensors":
            found |= {f"{name}:{key}": x.tobytes() for key, x in load_file(path).items()}
        elif kind.command[0] != "train" and (
            kind.command[0] != "study" or path.name in ("ablation.csv", "ablation.json")
        ):
            found[name] = path.read_bytes()
    return found


def arguments(kind: Kind, place: Path, out: Path) -> list[str]:
    words = []
    for word in kind.command:
        if word == "SETTINGS":
            for line in (place / "settings.txt").read_bytes().decode("utf-8", "surrogateescape").splitlines():
                words += ["--set", line]
        else:
            words.append(word.replace("HERE", str(place)).replace("OUT", str(out)))
    return words


def read(kind: Kind, place: Path, out: Path) -> children.Outcome:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for name in ("half", "study"):  # commands that go on with what is there do so in a copy
        if f"OUT/{name}" in kind.command:
            shutil.copytree(place / name, out / name, symlinks=True, copy_function=_copy)
    return children.run(children.command(*arguments(kind, place, out)), limit=SECONDS, memory=MEMORY)


def _copy(source: str, target: str) -> None:
    """Also of what is no file."""
    if os.path.isfile(source):
        shutil.copyfile(source, target)
    elif not os.path.islink(source):
        os.mkfifo(target)


def clean(text: str) -> bool:
    """Lines of a bearable length, of characters that stay in their line and move no cursor."""
    return all(len(line) <= LONGEST and (line.isprintable()) for line in text.split("\n"))


def judge(kind: Kind, outcome: children.Outcome, found: dict[str, bytes], usual, path: Path, touched: bool) -> str:
    if outcome.late:
        return "hang"
    if outcome.traceback:
        return "traceback"
    if outcome.code < 0:
        return "crash"
    if touched:
        return "written elsewhere"
    if outcome.code not in (*kind.ends, 2) or not clean(outcome.stdout) or not clean(outcome.stderr):
        return "unclean"
    if outcome.code == 2:
        errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
        last = outcome.stderr.endswith(f"{errors[0]}\n") if errors else False
        # What a library prints is no line of d2net's.
        known = all(line.startswith(("error: ", *REMARKS, "iteration ")) for line in outcome.stderr.splitlines())
        return "clean error" if len(errors) == 1 and last and known else "unclean"
    undisturbed, expected = usual
    if found == expected and outcome.stdout == undisturbed.stdout:
        return "same result"
    said = outcome.stdout.splitlines() if kind.command[0] == "inspect" else outcome.stderr.splitlines()
    before = (undisturbed.stdout if kind.command[0] == "inspect" else undisturbed.stderr).splitlines()
    remarks = [line for line in said if line not in before and line.startswith(REMARKS)]
    progress = [line for line in remarks if not line.startswith("  ") or kind.command[0] == "inspect"]
    if progress:
        return "other, and says so"
    if kind.documented is not None:

        def by_the_documents() -> None:
            try:
                kind.documented(path)
            except BaseException:
                raise SystemExit(3) from None

        if children.run(by_the_documents, limit=SECONDS, memory=MEMORY).code == 0:
            return "valid but another input"
    return "silently other"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=60, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--case", type=int, help="only this case, and show all that it prints")
    parser.add_argument("--keep", type=Path, help="keep damaged files with a bad end in this folder")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    children.import_all()
    table: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="d2net-corpus-") as name:
        folder = Path(name) / "a" / "b" / "c"  # room for what climbs out of its folder
        place, out = folder / "data", folder / "out"
        place.mkdir(parents=True)
        every = kinds(place)
        contents = [(place / file).read_bytes() for kind in every for file in kind.files]
        chosen = [kind for kind in every if given.only in kind.name]
        for kind in chosen:
            undisturbed = read(kind, place, out)
            if undisturbed.code != 0 or not clean(undisturbed.stdout):
                raise SystemExit(
                    f"{kind.name}: fails undamaged: {undisturbed.stdout[-300:]} {undisturbed.stderr[-600:]}"
                )
            usual = undisturbed, result(kind, out)
            before = surroundings(Path(name), out)
            counts = Counter(dict.fromkeys((*GOOD, *BAD), 0))
            instead = [x for x in damage.INSTEAD if kind.instead and not (kind.optional and x == "nothing")]
            for case in range(given.number) if given.case is None else [given.case]:
                rng = random.Random(f"{given.seed} {kind.name} {case}")
                file = place / rng.choice(kind.files)
                content = file.read_bytes()
                if case < len(instead):
                    what = f"is {instead[case]}"
                    file.unlink()
                    damage.INSTEAD[instead[case]](file)
                else:
                    what, damaged = rng.choice((*damage.ANY, *kind.odd))(rng, content, rng.choice(contents))
                    file.write_bytes(damaged)
                changed = surroundings(Path(name), out)
                outcome = read(kind, place, out)
                touched = surroundings(Path(name), out) != changed
                verdict = judge(kind, outcome, _result(kind, out, outcome), usual, file, touched)
                counts[verdict] += 1
                if given.case is not None:
                    print(f"{what}\n{outcome.stdout}\n{outcome.stderr}\nexit code {outcome.code}: {verdict}")
                if verdict in BAD:
                    last = (outcome.stderr.strip().splitlines() or [""])[-1]
                    how = f"{file.name} {what}; exit code {outcome.code}, {last[:200]!a}"
                    problems.append(f"{kind.name}, case {case}: {verdict}: {how}")
                    print(f"  {problems[-1]}", flush=True)
                    if given.keep and file.is_file():
                        given.keep.mkdir(exist_ok=True)
                        shutil.copy(file, given.keep / f"{kind.name.replace(' ', '_')}-{case}-{file.name}")
                if file.is_dir() and not file.is_symlink():
                    shutil.rmtree(file)
                elif os.path.lexists(file):
                    file.unlink()
                file.write_bytes(content)
                for path in set(surroundings(Path(name), out)) - set(before):
                    shutil.rmtree(path) if os.path.isdir(path) else os.path.lexists(path) and os.unlink(path)
            table[kind.name] = dict(counts)
            print(f"{kind.name}: {', '.join(f'{k} {v}' for k, v in counts.items() if v)}", flush=True)
    total = Counter()
    for counts in table.values():
        total.update(counts)
    if given.json:
        figures = {**children.environment(), "seed": given.seed, "kinds": table, "total": total, "problems": problems}
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    failed = sum(total[verdict] for verdict in BAD)
    print(f"{total.total()} damaged files of {len(table)} kinds: {dict(total)}; {failed} failures")
    return 1 if failed else 0


def _result(kind: Kind, out: Path, outcome: children.Outcome) -> dict[str, bytes]:
    try:
        return result(kind, out) if outcome.code in kind.ends else {}
    except Exception as error:  # a result that cannot be read is another one
        return {"unreadable": repr(error).encode()}


if __name__ == "__main__":
    sys.exit(main())
