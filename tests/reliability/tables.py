"""Puts the figures of ``results/*.json`` into docs/reliability.md, as tables.

    python tests/reliability/tables.py

The files are what ``--json`` of kills.py, corpus.py and operators.py writes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: tests/reliability/tables.py -->\n", "<!-- end of figures -->"
FAILED = ("crash", "hang", "traceback", "written elsewhere", "unclean", "silently other")


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def ran(found: dict) -> str:
    return f"{found['date']}, commit {found['commit']}, seed {found['seed']}"


def kills(found: dict | None) -> str:
    head = row(
        "ended", "runs", "of them to the end", "lost", "moved away", "different", "left over", "no way on", "traceback"
    )
    text = head + "|---|" + 8 * "---:|" + "\n"
    if found is None:
        return text + row("not yet run", *8 * [""])
    words = {"time": "at a random moment", "change": "before a change of a file", "full": "full disk"}
    for name, ways in found["attacks"].items():
        for way, n in ways.items():
            moved = n.get("earlier result not at its place", 0)
            numbers = (n["runs"], n["went through"], n["lost"], moved, n["different"], n["litter"], n["no way on"])
            text += row(f"`{name}`, {words[way]}", *numbers, n["traceback"] + n["hung"])
    return f"Kills and full disks ({ran(found)}):\n\n{text}"


def corpus(found: dict | None) -> str:
    text = row("file", "damaged", "clean error", "same", "said", "valid", "failed") + "|---|" + 6 * "---:|" + "\n"
    if found is None:
        return text + row("not yet run", *6 * [""])
    for name, n in (*found["kinds"].items(), ("all", found["total"])):
        good = (n["clean error"], n["same result"], n["other, and says so"], n["valid but another input"])
        text += row(name, sum(n.values()), *good, sum(n[verdict] for verdict in FAILED))
    return f"Damaged files ({ran(found)}):\n\n{text}"


def operators(found: dict | None) -> str:
    text = (
        row("calls", "number", "as documented", "undecided", "accepted", "failed or crashed")
        + "|---|"
        + 5 * "---:|"
        + "\n"
    )
    if found is None:
        return text + row("not yet run", *5 * [""])
    words = {"right": "right", "misused": "one argument wrong", "registered": "the same, `torch.ops.d2net`"}
    for kind, name in words.items():
        n = Counter({key.partition(": ")[2]: v for key, v in found["calls"].items() if key.startswith(f"{kind}: ")})
        good, bad = n["good"] + n["other error"], n["failed"] + n["crashed"] + n["hung"]
        text += row(name, n.total(), good, n["undecided"], n["accepted"], bad)
    return f"Operators ({ran(found)}):\n\n{text}"


def figures() -> str:
    """The part of the page between its marks."""
    parts = []
    for table in (kills, corpus, operators):
        path = HERE / "results" / f"{table.__name__}.json"
        parts.append(table(json.loads(path.read_text()) if path.exists() else None))
    return "\n".join(parts)


def split(page: str) -> tuple[str, str, str]:
    """Before the figures, the figures, behind them."""
    before, _, rest = page.partition(BEGIN)
    old, _, behind = rest.partition(END)
    return before, old, behind


if __name__ == "__main__":
    before, _, behind = split(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(before + BEGIN + figures() + END + behind, encoding="utf-8")
