"""Nothing runs what a file says, and nothing is fetched: what SECURITY.md promises, looked for in the source itself."""

from __future__ import annotations

import ast
import builtins
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = sorted([*(ROOT / "d2net").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), ROOT / "setup.py"])

# What runs code that it is given, named or called; of a module, all of it.
RUNS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "runpy",
    "code",
    "torch.hub",
    "torch.jit.load",
}
UNPICKLES = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler", "pickle._load", "pickle._loads",
    "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "pandas.read_pickle", "torch.package",
    "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "yaml.Loader",
    "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.CLoader",
}  # fmt: skip
UNPICKLES |= {
    f"torch.distributed.{name}"
    for name in (
        "all_gather_object", "broadcast_object_list", "gather_object", "recv_object_list", "scatter_object_list"
    )
}  # fmt: skip
FETCHES = {
    "urllib.request", "http", "requests", "httpx", "aiohttp", "urllib3", "ftplib", "smtplib", "huggingface_hub",
    "torch.hub", "socket.socket", "socket.create_connection", "webbrowser",
}  # fmt: skip

# Each is read before it is allowed. What is allowed and gone must go from here too.
ALLOWED = {
    (
        "d2net/data/pickled.py",
        "pickle._Unpickler",
    ): "the reader behind --trust-pickle: it makes arrays and plain values "
    "alone and refuses every other name (tests/data/test_pickled.py)",
    ("d2net/data/watch.py", "numpy.load(allow_pickle)"): "the demo's recordings, whose SHA-256 was compared before",
    ("d2net/recipes/yaml_text.py", "yaml.load"): "with a loader that is a SafeLoader without tags and aliases",
    ("d2net/studies/ablation/job.py", "pickle.loads"): "a function that the study's own process has pickled and its "
    "executor has brought, which pickles all jobs; it comes from no file",
}


def name_of(node: ast.AST, imported: dict[str, str]) -> str:
    """``np.load`` as ``numpy.load``, by what the file imports; "" for what is neither imported nor built in."""
    if isinstance(node, ast.Name):
        return imported.get(node.id, node.id if hasattr(builtins, node.id) else "")
    if isinstance(node, ast.Attribute):
        owner = name_of(node.value, imported)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


@functools.cache
def names_and_calls(source: str) -> tuple[set[str], list[tuple[ast.Call, str]]]:
    """Every dotted name that a file imports or mentions, and its calls with what they call."""
    nodes = list(ast.walk(ast.parse(source)))
    imported, names = {}, set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            imported |= {
                x.asname or x.name.split(".")[0]: x.name if x.asname else x.name.split(".")[0] for x in node.names
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported |= {x.asname or x.name: f"{node.module}.{x.name}" for x in node.names}
    names |= set(imported.values())
    names |= {name_of(node, imported) for node in nodes if isinstance(node, (ast.Name, ast.Attribute))}
    return names, [(node, name_of(node.func, imported)) for node in nodes if isinstance(node, ast.Call)]


def among(name: str, banned: set[str]) -> set[str]:
    """Which of them a dotted name is, or lies in."""
    parts = name.split(".")
    return banned & {".".join(parts[:i]) for i in range(1, len(parts) + 1)}


def given(call: ast.Call, argument: str) -> object:
    """The constant that an argument is given; ... for anything else, None where it is left out."""
    for keyword in call.keywords:
        if keyword.arg in (argument, None):
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
    return None


def wrong_call(call: ast.Call, name: str) -> str | None:
    """Calls that are safe or not by their arguments."""
    if name == "torch.load" and given(call, "weights_only") is not True:
        return "torch.load without weights_only=True"
    by_place = {"numpy.load": 3, "numpy.lib.format.read_array": 2}.get(name)
    if by_place and (given(call, "allow_pickle") not in (None, False) or len(call.args) >= by_place):
        return f"{name}(allow_pickle)"
    if name == "yaml.load":
        return name
    if name == "importlib.import_module" and not isinstance(call.args[0], ast.Constant):
        return "importlib.import_module of a name that is computed"
    if name.startswith("subprocess.") and given(call, "shell") not in (None, False):
        return "subprocess in a shell"
    return None


def offences(source: str, banned: set[str]) -> set[str]:
    return set().union(*(among(name, banned) for name in names_and_calls(source)[0]))


def all_offences(source: str) -> set[str]:
    wrong = {wrong_call(*call) for call in names_and_calls(source)[1]}
    return offences(source, RUNS | UNPICKLES) | wrong - {None}


def test_nothing_unpickles_or_runs_what_it_reads() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), offence)
        for path in PYTHON
        for offence in all_offences(path.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED.keys(), "not allowed, or allowed and gone"


@pytest.mark.parametrize(
    ("source", "offence"),
    [
        ("import pickle\npickle.load(file)", "pickle.load"),
        ("import pickle as p\nread = p.loads", "pickle.loads"),
        ("from pickle import loads as parse\nparse(x)", "pickle.loads"),
        ("import pickle\nclass Mine(pickle.Unpickler): ...", "pickle.Unpickler"),
        ("def f():\n    import marshal\n", "marshal"),
        ("import joblib", "joblib"),
        ("from dill import load", "dill"),
        ("import torch\ntorch.load(path)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(path, weights_only=mine)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(path, **options)", "torch.load without weights_only=True"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "numpy.load(allow_pickle)"),
        ("import numpy\nnumpy.load(path, None, True)", "numpy.load(allow_pickle)"),
        ("from numpy import load\nload(path, allow_pickle=x)", "numpy.load(allow_pickle)"),
        ("import yaml\nyaml.load(text, yaml.SafeLoader)", "yaml.load"),
        ("import yaml\nyaml.full_load(text)", "yaml.full_load"),
        (
            "import torch.distributed as dist\ndist.broadcast_object_list([x])",
            "torch.distributed.broadcast_object_list",
        ),
        ("eval(text)", "eval"),
        ("run = exec", "exec"),
        ("__import__(name)", "__import__"),
        ("import importlib\nimportlib.import_module(name)", "importlib.import_module of a name that is computed"),
        ("import os\nos.system(command)", "os.system"),
        ("from os import popen", "os.popen"),
        ("import subprocess\nsubprocess.run(command, shell=True)", "subprocess in a shell"),
        ("from subprocess import run\nrun(command, shell=x)", "subprocess in a shell"),
    ],
)
def test_a_planted_offence_is_found(source: str, offence: str) -> None:
    assert all_offences(source) == {offence}


def test_what_is_safe_is_no_offence() -> None:
    safe = """
import importlib, pickle, subprocess, numpy as np, torch, yaml
model.eval(); re.compile(x); pickle.dumps(x)
torch.load(path, weights_only=True); np.load(path); np.load(path, allow_pickle=False); yaml.safe_load(text)
importlib.import_module("d2net._C"); subprocess.run(["git"], check=True)
"""
    assert all_offences(safe) == set()


# --- The network ------------------------------------------------------------------------------------------------------


def test_nothing_is_fetched() -> None:
    """Neither by the package nor while it is built; processes that train together meet through PyTorch."""
    for path in PYTHON:
        assert not offences(path.read_text(encoding="utf-8"), FETCHES), path


@pytest.mark.parametrize(
    "source", ["from urllib.request import urlopen", "import requests as r", "import torch\ntorch.hub.load(x, y)"]
)
def test_fetching_is_found(source: str) -> None:
    assert offences(source, FETCHES)


FETCHING_CMAKE = re.compile(
    r"FetchContent|ExternalProject|file\s*\(\s*(DOWNLOAD|UPLOAD)|CPM|COMMAND\s+\S*\b(git|curl|wget|pip)\b|https?://",
    re.IGNORECASE,
)


def without_comments(cmake: str) -> str:
    return re.sub(r"#.*", "", cmake)


CMAKE = [ROOT / "CMakeLists.txt", *sorted(x for each in ("tests", "packaging") for x in (ROOT / each).rglob("*.cmake"))]


@pytest.mark.parametrize("path", CMAKE, ids=lambda path: path.name)
def test_cmake_fetches_nothing(path: Path) -> None:
    assert not FETCHING_CMAKE.search(without_comments(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "line", ["include(FetchContent)", "ExternalProject_Add(x)", "file (DOWNLOAD x y)", "execute_process(COMMAND git x)"]
)
def test_fetching_cmake_is_found(line: str) -> None:
    assert FETCHING_CMAKE.search(line)
