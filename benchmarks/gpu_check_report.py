"""Puts the results of gpu_check.sh into one JSON file and one Markdown file, and prints the summary table."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

SHOWN = 40  # tests that did not pass


def read_tests(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """How many tests there are, and the results by test, in the order of their beginning; see gpu_check_tests.py."""
    collected, found = 0, {}
    for line in path.read_text().splitlines():
        name, outcome, seconds, reason = line.split("\t")
        if name:
            before = found.get(name, {"seconds": 0.0, "reasons": []})
            reasons = before["reasons"] + [reason] * bool(reason)
            found[name] = {"outcome": outcome, "seconds": before["seconds"] + float(seconds), "reasons": reasons}
        elif outcome == "collected":
            collected = max(collected, int(reason))
    return collected, found


def tests_markdown(collected: int, tests: dict[str, dict[str, Any]]) -> list[str]:
    if not tests:
        return []
    counts = Counter(test["outcome"] for test in tests.values()) + Counter({"not run": collected - len(tests)})
    seconds = sum(test["seconds"] for test in tests.values())
    lines = ["### tests", "", f"{', '.join(f'{n} {what}' for what, n in counts.items())}; {seconds:.0f} s.", ""]
    bad = [(name, test) for name, test in tests.items() if test["outcome"] not in ("passed", "skipped")]
    lines += [
        f"- `{name}` {test['outcome']}: {'; '.join(test['reasons']) or 'see the log'}" for name, test in bad[:SHOWN]
    ]
    lines += [f"- and {len(bad) - SHOWN} more"] * (len(bad) > SHOWN)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="environment.json, checks.tsv, tests.tsv, results/ of benchmarks")
    parser.add_argument("out", type=Path, help="path of the results without their endings")
    parser.add_argument("--dry-run", action="store_true", help="say that nothing ran on a GPU")
    options = parser.parse_args()

    keys = ("stage", "check", "status", "seconds", "reason")
    lines = (options.work / "checks.tsv").read_text().splitlines()
    checks = [dict(zip(keys, line.split("\t"), strict=True)) for line in lines]
    passed = all(check["status"] in ("passed", "skipped") for check in checks)
    where = json.loads((options.work / "environment.json").read_text())
    collected, tests = read_tests(options.work / "tests.tsv")
    results = options.work / "results"
    result = {
        "dry_run": options.dry_run,
        "passed": passed,
        "environment": where,
        "checks": checks,
        "tests": tests,
        "benchmarks": {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))},
    }

    named = ("device", "driver", "torch", "cuda", "python", "commit", "date")
    lines = ["# GPU check" + (" (dry run: nothing here ran on a GPU)" if options.dry_run else ""), ""]
    lines += [", ".join(f"{key} {where[key]}" for key in named if where.get(key)), ""]
    summary = ["| stage | check | result | s |", "|---|---|---|---:|"]
    for check in checks:
        status = check["status"] + (f": {check['reason']}" if check["reason"] else "")
        summary.append(f"| {check['stage']} | {check['check']} | {status} | {check['seconds']} |")
    summary += ["", *tests_markdown(collected, tests)]
    tables = [path.read_text() for path in sorted(results.glob("*.md"))]
    for ending, text in ((".json", json.dumps(result, indent=1)), (".md", "\n".join([*lines, *summary, *tables]))):
        part = options.out.with_name(f"{options.out.name}{ending}.part")
        part.write_text(f"{text}\n")
        part.replace(part.with_suffix(""))

    print("\n".join([*tables, *lines, *summary]))
    print(f"{'all passed' if passed else 'NOT ALL PASSED'}; wrote {options.out}.json, .md, .log")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
