"""The processes of one `prepare`, on one node or many: who does what next, and what went wrong where.

They share a folder and a store of counters; nothing but numbers and messages travels between them.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from soar_mega.distributed import START_TIMEOUT

T = TypeVar("T")

_starts = itertools.count()  # in this process, and so in the others: the store of a launcher outlives each

WORK_TIMEOUT = timedelta(days=30)  # a process that is done waits for the slowest; a dead one is seen at once
GONE = "another process of this prepare has ended: its own message says why. The same command goes on"


class Processes:
    """This process and those that work beside it; torchrun's environment says how many there are."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._store: dist.Store = dist.HashStore()
        self._steps = 0
        self._group: dist.ProcessGroup | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._start()

    def _start(self) -> None:
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        store.set_timeout(START_TIMEOUT)
        self._store = dist.PrefixStore(f"prepare {next(_starts)}", store)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=WORK_TIMEOUT,
        )
        self._group = dist.group.WORLD

    def close(self) -> None:
        """Leave the others; to be called at the end, whatever happened."""
        if self._group is not None:
            dist.destroy_process_group()
            self._group = None

    def together(self, work: Callable[[], T]) -> T:
        """Do a step of the work and wait until all have done it. Collective.

        Raises:
            ValueError, OSError: what this process or another one raised, or that another one is gone.
        """
        self._steps += 1
        mine: ValueError | OSError | None = None
        try:
            result = work()
        except (ValueError, OSError) as error:
            mine = error
            self._store.set(f"error {self._steps} of {self.rank}", str(error))
        except dist.DistError as error:  # the counters were with the first process
            raise ValueError(GONE) from error
        failed = self._least(self.size if mine is None else self.rank)
        if mine is not None:
            raise mine
        if failed < self.size:
            raise ValueError(self._store.get(f"error {self._steps} of {failed}").decode())
        return result

    def first_alone(self, work: Callable[[], int | None]) -> int:
        """A step that the first process does while the others wait; its result on all, 0 where it has none.

        Collective; raises what `together` does.
        """
        name = f"result {self._steps}"

        def of_the_first() -> None:
            if self.rank == 0:
                self._store.set(name, str(int(work() or 0)))

        self.together(of_the_first)
        return int(self._store.get(name))

    def shares(self, name: str, count: int) -> Iterator[int]:
        """The numbers below `count` that fall to this process; each is given to whoever is free next."""
        while (number := self._store.add(f"next of {name}", 1) - 1) < count:
            yield number

    def count(self, name: str, more: int) -> int:
        """Add to a counter of all processes; what it is now."""
        return self._store.add(f"count of {name}", more)

    def _least(self, number: int) -> int:
        if self._group is None:
            return number
        least = torch.tensor(number)
        try:
            dist.all_reduce(least, dist.ReduceOp.MIN)
        except RuntimeError as error:
            raise ValueError(GONE) from error
        return int(least)
