"""The hashed lists of packages are of what pyproject.toml and constraints.txt ask for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-").replace(".", "-")


def listed(file: str) -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each package."""
    entries = re.split(r"^(?=[\w.-]+==)", (ROOT / "requirements" / file).read_text(), flags=re.MULTILINE)
    found = {}
    for entry in entries:
        if match := re.match(r"([\w.-]+)==(\S+)", entry):
            found[name(match[1])] = match[2], len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry))
    return found


@pytest.mark.parametrize(("file", "extras"), [("demo.txt", ["demo"]), ("ci.txt", ["demo", "test", "dev"])])
def test_all_that_is_asked_for_is_there_with_its_hashes(file, extras):
    packages = listed(file)
    asked = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    asked += [each for extra in extras for each in EXTRAS[extra] if not each.startswith("d2net[")]
    assert {name(each) for each in asked} - {"torch"} <= set(packages)
    assert "torch" not in packages
    assert all(hashes for _, hashes in packages.values())


@pytest.mark.parametrize("file", ["demo.txt", "ci.txt", "torch.txt"])
def test_versions_are_those_of_the_constraints(file):
    packages = listed(file)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for package, version in pins.items():
        assert packages.get(name(package), (version,))[0] == version, package


def test_what_builds_the_package_has_upper_bounds():
    for each in PROJECT["build-system"]["requires"]:
        assert re.search(r"<\d", each), each
