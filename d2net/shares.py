"""Work that is shared over ranks: who does what, and what each tells the first, which writes the result."""

from __future__ import annotations

import heapq
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from d2net.distributed import Ranks, lost_ranks

_POLL = 0.1  # seconds
_PATIENCE = timedelta(days=30)  # for the others to do their shares; that one has died is seen at once
_count = itertools.count()


def deal(costs: Sequence[int], ranks: int, *, evenly: bool = False) -> list[list[int]]:
    """Which things each rank does, in their order: the largest first, each to the rank with the least work so far.

    Args:
        costs: Of each thing; 0 counts as 1.
        ranks: How many there are.
        evenly: As many things for each rank, up to one, which the first ranks have more.
    """
    number = len(costs)
    if ranks == 1:
        return [list(range(number))]
    free = [number // ranks + (rank < number % ranks) if evenly else number for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks) if free[rank]]  # a heap of the work of those that may have more
    for thing in sorted(range(number), key=lambda i: -costs[i]):
        work, rank = least[0]
        shares[rank].append(thing)
        if len(shares[rank]) < free[rank]:
            heapq.heapreplace(least, (work + max(1, costs[thing]), rank))
        else:
            heapq.heappop(least)
    return [sorted(share) for share in shares]


class Mailbox:
    """What the ranks tell rank 0 while each works on its own share, without waiting for one another.

    The messages are JSON. All ranks must make it, at the same point.

    Args:
        ranks: Who they are.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._sent: list[Any] = []  # by rank 0 to itself
        self._number = 0
        self._next = [0] * ranks.size  # to be received from each
        if ranks.size > 1:
            with lost_ranks():
                # A collective of this group may wait for as long as a share takes.
                self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            # In PyTorch nothing public gives the store that the group was made with.
            store = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore(f"d2net/mail/{next(_count)}", store)

    def send(self, message: Any) -> None:
        """Tell rank 0."""
        if self.ranks.leads:
            self._sent.append(message)
            return
        with lost_ranks():
            self._store.set(key := f"{self.ranks.rank}/{self._number}", json.dumps(message))
            self._store.check([key])  # of which the answer comes after the message has arrived
        self._number += 1

    def received(self) -> Iterator[Any]:
        """On rank 0 what it was told since it last asked, by itself too; on the others nothing.

        Raises:
            RankEnded: the one that keeps the messages has ended.
        """
        while self._sent:
            yield self._sent.pop(0)
        for rank in range(1, self.ranks.size) if self.ranks.leads else ():
            while (message := self._taken(f"{rank}/{self._next[rank]}")) is not None:
                self._next[rank] += 1
                yield json.loads(message)

    def _taken(self, key: str) -> bytes | None:
        with lost_ranks():
            if not self._store.check([key]):
                return None
            message = self._store.get(key)
            self._store.delete_key(key)
        return message

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Wait until all ranks are here, and call ``meanwhile`` every so often.

        Raises:
            RankEnded: one has ended.
        """
        if self.ranks.size > 1:
            with lost_ranks():
                arrived = dist.barrier(group=self._group, async_op=True)
            while not arrived.is_completed():
                meanwhile()
                time.sleep(_POLL)
            with lost_ranks():
                arrived.wait()
