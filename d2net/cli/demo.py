"""``d2net demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2net.cli import predict
from d2net.cli.options import Threads, choose_device
from d2net.cli.outputs import REPORT_NAME, RUN_FILES, claim_folder, command_of
from d2net.cli.terminal import make_console
from d2net.errors import InputError


def demo(
    context: typer.Context,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where to write; replaces an earlier demo. Default: runs/demo, or runs/video."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of initialisation and sampling.")] = 0,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Training iterations; default: those of the recipe watch.")
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Find the actions of Kinetics-400 in this video instead, by the published I3D."
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train on real smartwatch recordings and find the exercises of unseen people: minutes on a CPU.

    The recordings come with a package: pip install seglearn==1.2.5

    \b
    Examples:
      d2net demo
      d2net demo --out /tmp/demo --seed 1
      d2net demo --video holiday.mp4
    """
    if video is not None:
        if seed or iterations:
            raise InputError("--video trains nothing: leave --seed and --iterations out")
        out = out or Path("runs/video")
        claim_folder(context, out, *predict.FILES, reads=[video])
        predict.find_actions("kinetics400", [video], out, device=choose_device("auto"), command=command_of(context))
        return
    from d2net.demo import run_demo

    out = out or Path("runs/demo")
    claim_folder(
        context, out, *RUN_FILES[:3], "run.json", "detections.json", "metrics.json", "timeline.png", REPORT_NAME
    )
    run_demo(out, seed, iterations=iterations, console=make_console(), command=command_of(context))
