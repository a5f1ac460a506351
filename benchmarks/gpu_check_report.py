"""Puts the results of gpu_check.sh into one JSON file and one Markdown file, and prints the summary table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from harness import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True, help="cpu or cuda")
    parser.add_argument("--checks", type=Path, required=True, help="rows of stage, check, status, seconds, reason")
    parser.add_argument("--results", type=Path, required=True, help="folder of the benchmarks' JSON and Markdown files")
    parser.add_argument("--out", type=Path, required=True, help="path of the results without their endings")
    parser.add_argument("--dry-run", action="store_true", help="say that nothing ran on a GPU")
    options = parser.parse_args()

    keys = ("stage", "check", "status", "seconds", "reason")
    checks = [dict(zip(keys, line.split("\t"), strict=True)) for line in options.checks.read_text().splitlines()]
    passed = all(check["status"] in ("passed", "skipped") for check in checks)
    where = environment(torch.device(options.device))
    result = {
        "dry_run": options.dry_run,
        "passed": passed,
        "environment": where,
        "checks": checks,
        "benchmarks": {path.stem: json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))},
    }
    options.out.with_name(options.out.name + ".json").write_text(json.dumps(result, indent=1) + "\n")

    named = ("device", "driver", "torch", "cuda", "python", "commit", "date")
    lines = ["# GPU check" + (" (dry run: nothing here ran on a GPU)" if options.dry_run else ""), ""]
    lines += [", ".join(f"{key} {where[key]}" for key in named if where.get(key)), ""]
    summary = ["| stage | check | result | s |", "|---|---|---|---:|"]
    for check in checks:
        status = check["status"] + (f": {check['reason']}" if check["reason"] else "")
        summary.append(f"| {check['stage']} | {check['check']} | {status} | {check['seconds']} |")
    tables = [path.read_text() for path in sorted(options.results.glob("*.md"))]
    text = "\n".join(lines + summary) + "\n\n" + "\n".join(tables)
    options.out.with_name(options.out.name + ".md").write_text(text)

    print("\n".join([*tables, *lines, *summary]))
    print(f"\n{'all passed' if passed else 'NOT ALL PASSED'}; wrote {options.out}.json, .md, .log")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
