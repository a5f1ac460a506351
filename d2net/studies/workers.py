"""Processes of this machine as an executor: one that is killed is replaced, and none outlives the study."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from d2net.errors import InputError

__all__ = ["WorkerLostError", "Workers"]

P = ParamSpec("P")
T = TypeVar("T")

_STOP, _END = b"stop", b"end"


class WorkerLostError(Exception):
    """A process ended in the middle of a call: it was killed, or there was no memory for it."""


class Workers(Executor):
    """An executor of ``number`` processes, each started anew (not forked: PyTorch's threads do not survive that).

    It differs from :class:`concurrent.futures.ProcessPoolExecutor` in three ways. A process that is killed fails the
    call that it had, with :class:`WorkerLostError`, and no other, and the next call gets a new process. Leaving the
    ``with`` block by an exception asks the trainings under way to stop: they finish their iteration and save. And
    where this process dies, they do so too, and end. Where there are several GPUs, each process has one of them as
    ``"cuda"``, in turn.

    A script that uses it needs ``if __name__ == "__main__":``, as the processes import it.

    Args:
        number: Of processes.

    Raises:
        InputError: a number below 1.
    """

    def __init__(self, number: int) -> None:
        if number < 1:
            raise InputError(f"--workers {number}: no process to train in; give at least 1")
        self._stopping = False
        self._places = itertools.count()
        self._processes: list[_Process] = []
        self._local = threading.local()  # each thread has a process of its own, so that a broken pool is of one call
        resource_tracker.ensure_running()  # later it would let SIGINT through, which the threads keep back
        self._threads = ThreadPoolExecutor(number, "d2net-worker", self._begin)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return self._threads.submit(self._call, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes.

        Args:
            wait: For the calls; without it the processes end with this one.
            cancel_futures: Drop the calls that have not begun, and ask trainings to stop and save.
        """
        if cancel_futures:
            self._stopping = True
            self._tell(_STOP)
        try:
            self._threads.shutdown(wait, cancel_futures=cancel_futures)
            for process in self._processes if wait else ():
                process.close()
        except KeyboardInterrupt:  # the second one
            self._tell(_END)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(cancel_futures=kind is not None)

    def _begin(self) -> None:
        """Of a thread. Its processes inherit that it keeps SIGINT back: Ctrl-C on a terminal reaches them too, and
        would end their imports with a traceback."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._local.place, self._local.process = next(self._places), None

    def _call(self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> T:
        process: _Process | None = self._local.process
        if process is None:
            process = self._local.process = _Process(self._local.place)
            self._processes.append(process)
        if self._stopping:  # this process may have come too late to be told
            raise WorkerLostError("the workers are stopping")
        try:
            return process.pool.submit(_run, fn, args, kwargs).result()
        except BrokenProcessPool:
            self._local.process = None
            self._processes.remove(process)
            process.close()
            raise WorkerLostError("it was killed, or there was no memory for it") from None

    def _tell(self, word: bytes) -> None:
        for process in self._processes:
            with suppress(OSError):  # it has ended
                process.words.send_bytes(word)


class _Process:
    """A pool of one process, and the end of a pipe through which it is told to stop."""

    def __init__(self, place: int) -> None:
        context = multiprocessing.get_context("spawn")
        # Kept, as the process starts with the first call; the other end closes with this process, however that ends.
        self.heard, self.words = context.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(1, context, _begin, (self.heard, place))

    def close(self) -> None:
        """Wait for its end."""
        self.pool.shutdown()
        self.heard.close()
        self.words.close()


# --- In the processes -------------------------------------------------------------------------------------------------

_stopping = threading.Event()
_busy = threading.Lock()


def stopping() -> bool:
    """Whether this process is one of :class:`Workers` and has been told to stop."""
    return _stopping.is_set()


def _begin(heard: Connection, place: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # but within a training, which saves itself then
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_listen, args=(heard,), daemon=True).start()
    take_gpu(place)


def take_gpu(place: int) -> None:
    """Where there are several GPUs, make one of them this process's ``"cuda"``: all in turn, by its place."""
    import torch

    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(place % torch.cuda.device_count())


def _listen(heard: Connection) -> None:
    """Stop when told to, or when the process that would tell has died."""
    while True:
        try:
            word = heard.recv_bytes()
        except (EOFError, OSError):
            word = b""
        if word == _END:
            os._exit(1)
        _stopping.set()
        os.kill(os.getpid(), signal.SIGINT)
        if not word:
            with _busy:
                os._exit(1)


def _run(fn: Callable[..., T], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> T:
    with _busy:
        return fn(*args, **kwargs)
