"""``d2net evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from d2net.cli.options import TrustPickle, choose_subsets
from d2net.cli.outputs import check_output
from d2net.cli.terminal import make_console, say
from d2net.errors import InputError
from d2net.words import is_number

if TYPE_CHECKING:
    from d2net.detections import Annotations
    from d2net.evaluation import Evaluation, LengthAnalysis

MOST_LEVELS = 10_000  # IoUs of one evaluation


def evaluate(
    detections: Annotated[
        Path, typer.Argument(metavar="DETECTIONS", help="Detections as ActivityNet JSON, or as CSV.")
    ],
    annotations: Annotated[
        str, typer.Option(metavar="PATH", help="Annotations: JSON, W-TALC folder, or a dataset as --data of localize.")
    ],
    subset: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME]", help="Subsets that were localized, or all; default: the test data."),
    ] = None,
    protocol: Annotated[
        str, typer.Option(metavar="activitynet|wtalc", help="How matches and AP are counted.")
    ] = "activitynet",
    tiou: Annotated[
        str,
        typer.Option(metavar="LIST", help="Temporal IoUs: START:STOP:STEP, STOP included, or a list as 0.3,0.5,0.7."),
    ] = "0.1:0.7:0.1",
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="TABLE",
            help="Print the run beside published results: thumos14, activitynet12, activitynet13 (Tables 1 and 2, and "
            "later methods), thumos14-losses, thumos14-denoising (Tables 3 and 4).",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Features to name in --compare, where the detections do not say."),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT.json", help="Write all numbers here too.")
    ] = None,
    ignore_unknown_videos: Annotated[
        bool, typer.Option("--ignore-unknown-videos", help="Drop detections in recordings without annotations.")
    ] = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Compare detections with annotations: mAP at each temporal IoU, averages, F1, average recall, AP by length.

    \b
    Examples:
      d2net evaluate detections.json --annotations watch
      d2net evaluate detections.json --annotations gt.json --subset test --protocol wtalc --tiou 0.1:0.7:0.1
      d2net evaluate detections.json --annotations anet.json --subset validation --tiou 0.5:0.95:0.05 --json out.json
      d2net evaluate detections.json --annotations gt.json --compare thumos14 --features "I3D (Kinetics)"
    """
    from d2net.detections import read_detections, read_features
    from d2net.evaluation import analyse_errors, analyse_lengths, average_recall, error_level
    from d2net.evaluation import evaluate as judge
    from d2net.files import write_whole

    levels = parse_tiou(tiou)
    if json_out:
        check_output(json_out, "--json", reads=[detections, annotations], suffixes=[".json"])
    if compare:
        from d2net.report import paper_tables

        table = paper_tables.load_table(compare)
    elif features:
        raise InputError("--features names the features of a run in a table; give one with --compare")
    truth, data_name = _annotations(annotations, subset, trust_pickle)
    found = read_detections(detections)
    unknown: Literal["ignore", "error"] = "ignore" if ignore_unknown_videos else "error"
    result = judge(found, truth, protocol=protocol, tiou=levels, unknown_videos=unknown)  # type: ignore[arg-type]
    recall = average_recall(found, truth, protocol, unknown_videos=unknown)  # type: ignore[arg-type]
    lengths = analyse_lengths(found, truth, protocol, levels, unknown_videos=unknown)  # type: ignore[arg-type]
    make_console().print(evaluation_table(result, title=f"{detections.name}, protocol {protocol}, in percent"))
    if line := result.averages_line():
        say(line)
    say(recall.line())
    make_console().print(lengths_table(lengths))
    for line in result.coverage.lines():
        say(line)
    numbers = result.to_json() | {"average_recall": recall.to_json(), "lengths": lengths.to_json()}
    if compare:
        covered = set(table.levels) <= set(levels)
        comparison = paper_tables.compare(
            table,
            result if covered else judge(found, truth, protocol=protocol, tiou=table.levels, unknown_videos=unknown),  # type: ignore[arg-type]
            run=f"this run: {detections.name}",
            features="; ".join(filter(None, (read_features(detections), (features or "").strip()))) or None,
            data=data_name,
            classes=result.coverage.classes,
        )
        make_console().print(paper_tables.comparison_table(comparison))
        for note in comparison.notes:
            say(f"note: {note}")
        numbers["comparison"] = comparison.to_json()
    if json_out:
        level = error_level(levels)
        if level is not None:
            numbers["errors"] = analyse_errors(found, truth, protocol, level, unknown_videos=unknown).to_json()  # type: ignore[arg-type]
        text = json.dumps(numbers, indent=1) + "\n"
        write_whole(json_out, text)
        say(f"wrote {json_out}")


def parse_tiou(text: str) -> tuple[float, ...]:
    """Temporal IoUs from ``START:STOP:STEP`` (STOP included) or a comma-separated list, in rising order.

    Raises:
        InputError: not such a text, or a value outside (0, 1].
    """
    wrong = InputError(
        f"--tiou {text}: give START:STOP:STEP as 0.1:0.7:0.1 or a list as 0.3,0.5,0.7, each above 0 and at most 1"
    )
    try:
        values = [float(v) for v in text.replace(":", ",").split(",") if is_number(text)]
    except ValueError:
        raise wrong from None
    if not values or not all(0 < v <= 1 for v in values):
        raise wrong
    if ":" in text:
        if len(values) != 3 or "," in text:
            raise wrong
        start, stop, step = values
        if stop < start or step > stop:  # START:STEP:STOP, as some papers write it
            raise wrong
        if (stop - start) / step > MOST_LEVELS:
            raise InputError(f"--tiou {text}: more than {MOST_LEVELS:,} levels; give a larger STEP")
        # In floating point 0.1 + 6 * 0.1 is more than 0.7: half a step of a millionth decides.
        values = [start + i * step for i in range(int((stop - start) / step + 1e-6) + 1)]
    return tuple(sorted({round(v, 6) for v in values}))


def evaluation_table(result: Evaluation, *, title: str) -> Table:
    """One row: mAP at each temporal IoU, its average, and F1, in percent."""
    table = Table(title=title, title_justify="left")
    for name in (*(f"mAP@{level:g}" for level in result.tiou), "average", "F1@0.5"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*(f"{v:.1f}" for v in (*result.map, result.average, result.f1)))
    return table


def lengths_table(lengths: LengthAnalysis) -> Table:
    """mAP_N and recall of the ground truths of each length, at the IoU nearest to 0.5 and averaged over all."""
    from d2net.evaluation import LENGTHS

    column = min(range(len(lengths.tiou)), key=lambda i: (abs(lengths.tiou[i] - 0.5), lengths.tiou[i]))
    level, many = f"@{lengths.tiou[column]:g}", len(lengths.tiou) > 1
    table = Table(title="By the length of the ground truth, in percent; mAP_N as DETAD has it", title_justify="left")
    table.add_column("length", no_wrap=True)
    for name in ("ground truths", f"mAP_N{level}", f"recall{level}", *["mAP_N average", "recall average"] * many):
        table.add_column(name, justify="right")
    rows = zip(LENGTHS, lengths.seconds(), lengths.ground_truth, lengths.map_n, lengths.recall, strict=True)
    for name, seconds, n, map_n, recall in rows:
        numbers = [map_n[column], recall[column], *[map_n.mean(), recall.mean()] * many]
        table.add_row(f"{name} {seconds}".strip(), str(n), *(f"{v:.1f}" if n else "-" for v in numbers))
    return table


def _annotations(place: str, subset: str | None, trust_pickle: bool) -> tuple[Annotations, str]:
    """The annotations of a file, W-TALC folder or dataset, and the name of the data."""
    from d2net.data import find_dataset

    catalog = find_dataset(place, trust_pickle=trust_pickle)
    for remark in (*catalog.remarks, *catalog.assumed):
        say(f"note: {remark}", err=True)
    truth = catalog.annotations(choose_subsets(catalog, subset, 1, "--subset"))
    if not len(truth):
        raise InputError(catalog.no_segments)
    return truth, catalog.name
