"""The processes that compute one result together: those that ``torchrun`` started, or this one alone.

They are PyTorch's: a process is a rank, and ``torch.distributed`` is what they talk through. What is asked for here is
the same on all of them, so that all come to the same call.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from d2net.errors import D2NetError, InputError
from d2net.launch import launched, launched_rank, number

__all__ = ["ALONE", "RankEnded", "Ranks", "of_group"]

TIMEOUT = timedelta(minutes=30)  # for one rank to wait for another, which may be saving, evaluating or reading


class RankEnded(D2NetError):
    """Another rank has ended, so this one cannot go on; that rank says why, if it can."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that compute together.

    Attributes:
        rank: Its number.
        size: How many there are.
        local_rank: Its number among those on this machine.
        local_size: How many are on this machine.
        group: For tensors of the CPU, whatever the device; None: it is alone.
        nccl: Whether tensors of a GPU are sent by NCCL.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: dist.ProcessGroup | None = None
    nccl: bool = False

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def share(self, number: int) -> range:
        """Which of ``number`` things are this rank's: every so manyth."""
        return range(self.rank, number, self.size)

    def most(self, *values: int) -> list[int]:
        """The largest of each number over all ranks."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.int64)
        with lost_ranks():
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return numbers.tolist()

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.most(0)

    def from_first(self, content: bytes | None) -> bytes:
        """What rank 0 gives, on all ranks; the others give None."""
        if self.size == 1:
            assert content is not None
            return content
        with lost_ranks():
            size = torch.tensor([0 if content is None else len(content)])
            dist.broadcast(size, group=self.group, group_src=0)
            data = torch.empty(int(size), dtype=torch.uint8)
            if content:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if len(data):
                dist.broadcast(data, group=self.group, group_src=0)
        return data.numpy().tobytes()

    def from_each(self, content: bytes) -> list[bytes]:
        """What every rank gives, on all ranks, in their order."""
        if self.size == 1:
            return [content]
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        with lost_ranks():
            dist.all_gather(sizes, torch.tensor([len(content)]), group=self.group)
            most = max(int(n) for n in sizes)
            mine = torch.zeros(most, dtype=torch.uint8)
            if content:
                mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            found = torch.empty(self.size, most, dtype=torch.uint8)
            if most:
                dist.all_gather(list(found.unbind()), mine, group=self.group)
        return [row[: int(n)].numpy().tobytes() for row, n in zip(found, sizes, strict=True)]

    def check_same(self, what: str, mine: str, way_out: str) -> None:
        """Require the same text on all ranks.

        Args:
            what: It is, for the message.
            mine: The text of this rank.
            way_out: Said at the end of the message.

        Raises:
            InputError: on rank 0, naming the first rank with another text, and its machine.
            RankEnded: on the other ranks.
        """
        if self.size == 1:
            return
        said = [json.loads(x) for x in self.from_each(json.dumps([mine, socket.gethostname()]).encode())]
        for rank, (text, host) in enumerate(said):
            if text != said[0][0]:
                self.refuse(f"rank {rank} on {host} has {what} {text}, rank 0 has {said[0][0]}; {way_out}")

    def refuse(self, message: str) -> None:
        """Raise an InputError on rank 0, and a RankEnded on the others, which all know of it and must call this."""
        self.wait()  # else one that is late would hear only that another has ended
        raise InputError(message) if self.leads else RankEnded(message)


ALONE = Ranks()


def of_group(nccl: bool | None = None) -> Ranks:
    """The ranks of PyTorch's process group, which must exist. All of them must call this.

    Args:
        nccl: Whether it sends tensors of a GPU by NCCL; None: as its backend says.
    """
    if nccl is None:
        nccl = "nccl" in dist.get_backend()
    with lost_ranks():
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    local_rank, local_size = number("LOCAL_RANK") or 0, number("LOCAL_WORLD_SIZE") or 1
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, local_size, group, nccl)


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Within the block what ``torch.distributed`` says of a rank that is gone is a RankEnded."""
    try:
        yield
    except RankEnded:
        _outlive_torchrun()  # again: a training has its own handler of the signal
        raise
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, dist.DistError) or any(sign in text for sign in _SIGNS)):
            raise
        _outlive_torchrun()
        raise RankEnded("another process of this run has ended before its time") from error


def _outlive_torchrun() -> None:
    """It ends the other processes where one has died, by SIGTERM: not before one of them has said so."""
    if launched() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


# Of the messages of gloo and of NCCL, which are plain RuntimeErrors in some versions.
_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")


class _Told:
    """Whether a rank has said why the run ends."""

    store: dist.Store | None = None

    def connect(self) -> None:
        """Take the store of torchrun before this rank has joined the others."""
        if self.store is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            with suppress(RuntimeError, ValueError):  # it has ended; a number in the environment that is none
                store = next(dist.rendezvous("env://", timeout=timedelta(seconds=5)))[0]
                self.store = dist.PrefixStore(f"d2net/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/before", store)

    def first(self) -> bool:
        if self.store is None:
            return launched_rank() == 0
        try:
            return self.store.add("d2net/told", 1) == 1
        except RuntimeError:  # it was with a rank that is gone
            return launched_rank() == 0

    def nobody_has(self, seconds: float) -> bool:
        """Waits so long for someone to speak."""
        end = time.monotonic() + seconds
        try:
            while self.store is not None and time.monotonic() < end:
                if self.store.add("d2net/told", 0):
                    return False
                time.sleep(0.05)
        except RuntimeError:
            return False
        return True


_told = _Told()


def tell_through(store: dist.Store) -> None:
    """Keep in this store whether a rank has said why the run ends."""
    _told.store = store


def speaks(error: BaseException) -> bool:
    """Whether this rank is the one to say why the run ends, so that one message is printed.

    A rank that only knows that another has ended lets that one speak, for a second. Of what ends all of them alike rank
    0 speaks, and another only where that says nothing for a while: long with Ctrl-C, on which rank 0 may have to save
    something first, and before they have joined.
    """
    if not launched():
        return True
    alike = isinstance(error, KeyboardInterrupt) or _told.store is None
    _told.connect()
    if isinstance(error, RankEnded):
        patience = 1.0
    else:
        patience = (5.0 if alike else 0.5) if launched_rank() else 0.0
    return (not patience or _told.nobody_has(patience)) and _told.first()
