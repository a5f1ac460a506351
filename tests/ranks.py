"""Real process groups for tests: processes that live as long as the tests, and form a group of gloo for each case.

Not a test module; conftest.py loads it. As a script it is one of the processes.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import d2net


class Processes:
    """Runs a function of a test module in several processes, which are its ranks."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._listener = Listener(str(Path(self._folder.name) / "socket"))
        self._workers: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._cases = 0

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(*arguments)`` on each of ``size`` ranks; what it returns, by rank.

        Args:
            size: How many ranks.
            function: A function of a module.
            arguments: Of types that any process can unpickle: none of a test's own.

        Raises:
            AssertionError: it raised on a rank; with the traceback.
        """
        new = [self._start() for _ in range(len(self._workers), size)]
        self._workers += [(process, self._listener.accept()) for process in new]
        self._cases += 1
        store, path = f"{self._folder.name}/{self._cases}", function.__code__.co_filename
        for rank, (_, pipe) in enumerate(self._workers[:size]):
            pipe.send((store, rank, size, path, function.__name__, arguments))
        try:
            found = [pipe.recv() for _, pipe in self._workers[:size]]
        except EOFError:
            found = [("a process has ended", None)]
        failed = [text for text, _ in found if text]
        if failed:
            self._stop()  # what they have left of the group could disturb the next one
        assert not failed, "\n".join(failed)
        return [result for _, result in found]

    def _start(self) -> subprocess.Popen[bytes]:
        own = str(Path(d2net.__file__).parents[1])
        path = os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [sys.executable, __file__, str(self._listener.address)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            cwd=self._folder.name,
        )

    def _stop(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.wait()
        self._workers = []

    def end(self) -> None:
        """End the processes."""
        self._stop()
        self._listener.close()
        self._folder.cleanup()


def work(address: str) -> None:
    """One of the processes, until the tests' end."""
    import torch
    import torch.distributed as dist

    modules: dict[str, Any] = {}
    with Client(address) as pipe:
        while True:
            try:
                store, rank, size, path, name, arguments = pipe.recv()
            except EOFError:
                return
            if path not in modules:
                spec = importlib.util.spec_from_file_location(Path(path).stem, path)
                assert spec is not None and spec.loader is not None
                modules[path] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[path])
            dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
            text, result = "", None
            try:
                result = getattr(modules[path], name)(*arguments)
            except BaseException:
                text = f"rank {rank}: {traceback.format_exc()}"
            if torch.__version__ < "2.8":  # as versions, not as texts
                time.sleep(0.2)  # as in d2net/meeting.py
            dist.destroy_process_group()
            pipe.send((text, result))


if __name__ == "__main__":
    work(sys.argv[1])
