"""How the processes that ``torchrun`` started find each other."""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from d2net.distributed import ALONE, TIMEOUT, RankEnded, Ranks, lost_ranks, of_group, tell_through
from d2net.errors import InputError
from d2net.launch import launched, number, odd
from d2net.words import quoted, reason


def device_of_rank(device: str) -> str:
    """The device of this rank: of the GPUs of a machine each rank takes its own, in turn where there are fewer."""
    if device != "cuda" or not launched():
        return device
    return f"cuda:{(number('LOCAL_RANK') or 0) % torch.cuda.device_count()}"


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Within the block this process computes together with those that were started with it, if any were.

    On GPUs they talk by NCCL; by gloo on CPUs, and where several share one GPU, which NCCL refuses.

    Args:
        device: Of this rank, such as :func:`device_of_rank` gives.

    Raises:
        InputError: numbers in the environment that cannot be, or versions of torch or d2net that differ.
    """
    if not launched():
        if said := odd():
            raise InputError(f"the environment says {quoted(said)}, as torchrun's does, but it cannot be; unset these")
        yield ALONE
        return
    store, rank, size = _met()
    store = _of_this_start(store, rank, size)
    tell_through(store)
    local_size = number("LOCAL_WORLD_SIZE") or size
    _check_versions(store, rank, size)
    nccl = device.startswith("cuda") and local_size <= torch.cuda.device_count() and dist.is_nccl_available()
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    with lost_ranks():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT
        )
    try:
        yield of_group(nccl)
    finally:
        if torch.__version__ < "2.8":  # as versions, not as texts
            # Its gloo waits, holding the GIL, for a thread that may need the GIL to let go of the last tensors.
            time.sleep(0.2)
        dist.destroy_process_group()


class _Waiting:
    """Says once, after a while, that this process waits for the others."""

    def __init__(self) -> None:
        self._until = time.monotonic() + 15

    def look(self) -> None:
        if time.monotonic() > self._until:
            self._until = math.inf
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            text = f"rank {os.environ['RANK']} waits for the others of {os.environ['WORLD_SIZE']}, at {where}"
            print(f"note: {text}", file=sys.stderr)


def _met() -> tuple[dist.Store, int, int]:
    """The store of the ranks, this one's number, and how many there are."""
    found: list[tuple[dist.Store, int, int]] = []
    failed: list[Exception] = []

    def meet() -> None:
        try:
            found.append(next(dist.rendezvous("env://", timeout=TIMEOUT)))
        except Exception as error:
            failed.append(error)

    # In a thread, as it hears of no Ctrl-C while it waits.
    thread, waiting = threading.Thread(target=meet, daemon=True), _Waiting()
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        waiting.look()
    if failed:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(f"the processes do not meet at {quoted(where)} ({reason(failed[0])})") from failed[0]
    return found[0]


def _of_this_start(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The store, without what was put there before torchrun started all ranks anew: it keeps one for all starts.

    Rank 0 takes a new number and tells it to each rank, by a word of which that rank has just thought; until all have
    answered, since the word that it sees first may be that of a process that is dead.
    """
    waiting = _Waiting()
    if rank:
        word = secrets.token_hex(8)
        store.set(f"d2net/word/{rank}", word)
        while not store.check([f"d2net/number/{word}"]):  # which lets Ctrl-C through, unlike get
            waiting.look()
            time.sleep(0.01)
        start = store.get(f"d2net/number/{word}").decode()
        store.set(f"d2net/answer/{word}/{start}", "")
        return dist.PrefixStore(f"d2net/{start}", store)
    start = str(store.add("d2net/starts", 1))
    missing, end = set(range(1, size)), time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        for other in list(missing):
            if not store.check([f"d2net/word/{other}"]):
                continue
            word = store.get(f"d2net/word/{other}").decode()
            store.set(f"d2net/number/{word}", start)
            if store.check([f"d2net/answer/{word}/{start}"]):
                missing.remove(other)
        if time.monotonic() > end:
            raise RankEnded(f"rank {min(missing)} has not come in {TIMEOUT.total_seconds() / 60:.0f} minutes")
        waiting.look()
        time.sleep(0.01)
    return dist.PrefixStore(f"d2net/{start}", store)


def _check_versions(store: dist.Store, rank: int, size: int) -> None:
    from d2net import __version__

    store.set(f"d2net/versions/{rank}", json.dumps([torch.__version__, __version__, socket.gethostname()]))
    said = [json.loads(store.get(f"d2net/versions/{r}")) for r in range(size)]
    for other, (*versions, host) in enumerate(said):
        for name, mine, first in zip(("torch", "d2net"), versions, said[0], strict=False):
            if mine != first:
                message = f"rank {other} on {host} has {name} {mine}, rank 0 has {first}; install the same everywhere"
                raise InputError(message) if rank == 0 else RankEnded(message)
