"""The lengths of THUMOS14's 200 training videos in snippets, and the command that makes their file again:

    python benchmarks/thumos14_lengths.py FOLDER     # with duration.npy, subset.npy and videoname.npy

A video of d seconds has floor(d * 25 / 16) snippets: I3D's features of the field are of 16 frames each at 25 frames a
second, and a last one that is not whole is not counted, as in the lengths of bench_proposals.py. The mean of
min(T, 750) is 284.3 then, so that 62.1 % of a batch that is padded to 750 is padding. (To the nearest it is 284.7,
rounded up 285.2; both are 62.0 %.)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
FRAMES_PER_SECOND = 25
FRAMES_PER_SNIPPET = 16
TRAINING_SUBSET = b"validation"  # THUMOS14's training videos are trimmed; the field trains on its validation videos


def thumos14_lengths() -> list[int]:
    """Snippets of every training video, in the order of their names."""
    return list(json.loads(FILE.read_text())["snippets"].values())


def from_annotations(folder: Path) -> dict[str, int]:
    """Snippets by the name of the video, from the durations among W-TALC's annotations."""
    names, subsets, durations = (np.load(folder / f"{x}.npy").ravel() for x in ("videoname", "subset", "duration"))
    return {
        name.decode(): int(duration * FRAMES_PER_SECOND / FRAMES_PER_SNIPPET)
        for name, subset, duration in sorted(zip(names, subsets, durations, strict=True))
        if subset == TRAINING_SUBSET
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="Thumos14reduced-Annotations")
    content = {
        "source": "duration.npy of Thumos14reduced-Annotations, which D2-Net publishes (github.com/naraysa/D2-Net)",
        "made_by": "python benchmarks/thumos14_lengths.py Thumos14reduced-Annotations",
        "formula": "floor(seconds * 25 / 16)",
        "snippets": from_annotations(parser.parse_args().folder),
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {FILE}: {len(content['snippets'])} videos")


if __name__ == "__main__":
    main()
