"""Processes on gloo under the rules of NCCL and CUDA, where a program that works on gloo may hang.

What stands for a device is a thread that takes messages in order:
- in_order: a message begins when those before it on its communicator are done, and is done when the other end has begun
  it too: nothing is buffered. The messages of one batch are on their way together.
- lazy: the first message of a communicator stops the host until all its ranks have come to theirs.
- synchronise: torch.cuda.synchronize stops the host until all messages are done.
- one_connection: a message keeps the device, as it may with CUDA_DEVICE_MAX_CONNECTIONS=1: whatever is computed after
  it waits for it, and there is one order for all communicators.
A wait on a message stops the host, because the computation behind it is done by the host here.
"""

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from soar_mega.engines.pipeline import Pipeline

RULES = ("lazy", "synchronise", "one_connection")
_gloo_isend, _gloo_irecv = dist.isend, dist.irecv


class Hang(AssertionError):
    """The host has waited for so long that nothing will come."""


class Batch:
    """Messages that are on their way together; what dist.batch_isend_irecv returns for them."""

    def __init__(self, parts: list[dist.P2POp], communicator: str, patience: float) -> None:
        self.parts, self.communicator = parts, communicator
        self._patience = patience
        self.done = threading.Event()

    def wait(self) -> bool:
        if not self.done.wait(self._patience):
            part = self.parts[0]
            raise Hang(f"rank {dist.get_rank()} waits for a message to or from rank {part.peer}")
        return True


class Device:
    """The messages of this process, in order.

    Args:
        rules: which hold beside the order of messages.
        patience: seconds that a host waits before it gives up.
    """

    def __init__(self, rules: tuple[str, ...], patience: float) -> None:
        assert set(rules) <= set(RULES)
        self._rules, self._patience = rules, patience
        self._queues: dict[str, queue.Queue[Batch]] = {}
        self._batches: list[Batch] = []
        self._known: set[str] = set()
        self._numbers: dict[str, int] = defaultdict(int)  # of messages by communicator and direction

    def launch(self, parts: list[dist.P2POp], communicator: str, members: list[int]) -> Batch:
        if "lazy" in self._rules and communicator not in self._known:
            self._meet(communicator, members)
        self._known.add(communicator)
        batch = Batch(parts, communicator, self._patience)
        line = "device" if "one_connection" in self._rules else communicator
        if line not in self._queues:
            self._queues[line] = queue.Queue()
            threading.Thread(target=self._work, args=(self._queues[line],), daemon=True).start()
        self._batches.append(batch)
        self._queues[line].put(batch)
        return batch

    def finish(self) -> None:
        """Wait for all messages."""
        for batch in self._batches:
            batch.wait()
        self._batches.clear()

    def compute(self) -> None:
        """The host is about to compute."""
        if "one_connection" in self._rules:
            self.finish()

    def synchronise(self) -> None:
        if "synchronise" in self._rules:
            self.finish()

    def _meet(self, communicator: str, members: list[int]) -> None:
        store = c10d._get_default_store()
        store.set(f"{communicator} has rank {dist.get_rank()}", "")
        deadline = time.monotonic() + self._patience
        while not store.check([f"{communicator} has rank {member}" for member in members]):
            if time.monotonic() > deadline:
                raise Hang(f"rank {dist.get_rank()} waits for the communicator {communicator}")
            time.sleep(0.002)

    def _work(self, line: "queue.Queue[Batch]") -> None:
        store = c10d._get_default_store().clone()  # a connection of its own
        while True:
            batch = line.get()
            pending = [self._begin(store, batch.communicator, part) for part in batch.parts]
            under_way: list[dist.Work] = []
            while pending:
                begun = [message for message in pending if store.check([message[0]])]
                pending = [message for message in pending if message not in begun]
                under_way += [start() for _, start in begun]
                time.sleep(0.001)
            for work in under_way:
                work.wait()
            batch.done.set()

    def _begin(self, store: Any, communicator: str, part: dist.P2POp) -> tuple[str, Callable[[], dist.Work]]:
        """What the store holds when the other end has begun a message too, and how gloo is told to carry it."""
        me, sends = dist.get_rank(), part.op is dist.isend
        source, target = (me, part.peer) if sends else (part.peer, me)
        way = f"{communicator}, {source} to {target}"
        number = self._numbers[way]
        self._numbers[way] += 1
        ends = [f"{way}, message {number}: {end}" for end in ("sent", "received")]
        store.set(ends[not sends], "")
        # gloo has one row of messages between two ranks of a group, NCCL one in each of its communicators
        tag = number + 10**6 * (communicator != part.group.group_name)
        carry = _gloo_isend if sends else _gloo_irecv
        return ends[sends], lambda: carry(part.tensor, part.peer, group=part.group, tag=tag)


def emulate(rules: tuple[str, ...] = RULES, patience: float = 60.0) -> Device:
    """Put this process, which has no CUDA, under the rules. It stays under them."""
    device = Device(rules, patience)

    def batch(parts: list[dist.P2POp]) -> list[Batch]:
        [group] = {part.group for part in parts}
        members = dist.get_process_group_ranks(group)
        return [device.launch(parts, group.group_name, members)] if parts else []

    def single(name: str) -> Any:
        def start(tensor: torch.Tensor, peer: int, group: Any = None, tag: int = 0) -> Batch:
            part = dist.P2POp(getattr(dist, name), tensor, peer, group, tag)
            pair = sorted((dist.get_rank(), peer))  # NCCL makes a communicator for each two ranks
            return device.launch([part], f"{part.group.group_name} {pair}", pair)

        return start

    forward = Pipeline.forward

    def computed(self: Pipeline, *arguments: Any) -> torch.Tensor:
        device.compute()
        return forward(self, *arguments)

    dist.batch_isend_irecv = batch
    c10d.isend = dist.isend = single("isend")
    c10d.irecv = dist.irecv = single("irecv")
    torch.cuda.synchronize = lambda *_: device.synchronise()
    Pipeline.forward = computed  # type: ignore[method-assign]
    return device
