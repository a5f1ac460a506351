"""What a contributor does, by name: ``nox -l`` lists it, ``nox -s tests -- tests/ops`` does it.

nox and no justfile, as pip installs it wherever Python runs. Everything runs in the environment that nox itself is in
(``pip install -e '.[dev]'``): one of its own would build the C++ anew for each.
"""

import sys

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]


@nox.session
def setup(session: nox.Session) -> None:
    """Install d2net in place with all tools."""
    session.run("python", "-m", "pip", "install", "-c", "constraints.txt", "-e", ".[dev]")


@nox.session
def build(session: nox.Session) -> None:
    """Compile what has changed in csrc/, in build/cmake, which pip would do all anew."""
    session.run("cmake", "-S", ".", "-B", "build/cmake", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}")
    session.run("cmake", "--build", "build/cmake")


@nox.session
def lint(session: nox.Session) -> None:
    """Lint, format, spelling and types, as CI has them. With `-- fix` what can be mended is."""
    fix = "fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")
    listed = session.run("git", "ls-files", "*.h", "*.cpp", "*.cu", "*.cuh", external=True, silent=True)
    session.run("clang-format", *(["-i"] if fix else ["--dry-run", "-Werror"]), *str(listed).split())
    session.run("typos")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, or those that are named: `-- tests/ops/test_iou.py`."""
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def native(session: nox.Session) -> None:
    """The C++ and the kernels under sanitizers, and the registers of the kernels that are built. Minutes."""
    session.run("python", "-m", "pytest", "-m", "slow", "tests/native", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, strictly, into site/."""
    session.run("python", "-m", "mkdocs", "build", "--strict", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """One benchmark, quickly: `-- iou` runs benchmarks/bench_iou.py; what follows are its options."""
    if not session.posargs:
        session.error("name one: nox -s bench -- iou")
    name, *options = session.posargs
    session.run("python", f"benchmarks/bench_{name}.py", *(options or ["--quick"]))
