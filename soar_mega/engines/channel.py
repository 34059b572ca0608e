"""How the answers of the rollout pass get from the last pipeline rank, which computes them, to the first.

NCCL has rules that gloo has not. What a device is told to do starts in the order in which it was told; a message takes
its place in that order and keeps it until both ends have come to it. So both ends put each message at a place where
nothing that the other end still has to do before it can depend on what comes behind it:

- BatchedChannel: one message with all answers, when the answer pass is over on this rank. The pass needs no answer.
- OverlappedChannel: messages of a few answers while the pass goes on. The first rank takes a message when as many
  micro-batches have followed its answers as there are ranks between the two ends: these hold one each, so none of the
  pass stands still, whatever order a device keeps.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from soar_mega.config import ParallelConfig
from soar_mega.distributed import device, new_group
from soar_mega.engines.branches import Branches

WINDOW = 4  # answers in a message of the overlapped channel, or one for each pipeline rank


class RolloutChannel(ABC):
    """Carries answers from the last pipeline rank to the first of the same tensor-, context- and data-parallel rank.

    In an answer pass all ranks of the pipeline call `open` and at the end `end_pass`; in between the last one calls
    `send` for each answer in turn, and the first one `advance` before each forward. All messages of a pass have their
    place in the order of both ends before those of the next, so the answers of several passes can be on their way.
    """

    def __init__(self) -> None:
        self._group, self._last, self._first = _last_to_first_group()
        self.forgotten: list[tuple[list[list[dist.Work]], Tensor | None]] = []
        self._warm_up()

    def open(self, count: int, answers: Tensor | None) -> "Messages":
        """Announce `count` answers, the rows of `answers` [count, ...] at both ends, which are written in place."""
        for messages_of_pass, _ in self.forgotten:
            _finish(messages_of_pass)
        self.forgotten.clear()
        return Messages(self, count, answers)

    @abstractmethod
    def send(self, messages: "Messages", i: int) -> None:
        """On the last rank, with answer i in its place: start the messages that are due; returns at once."""

    @property
    def is_end(self) -> bool:
        """Whether this rank is one of the two ends."""
        return self._group is not None

    @abstractmethod
    def advance(self, messages: "Messages", forwards: int) -> None:
        """On the first rank, after `forwards` forwards of the pass: start the messages that are due."""

    def end_pass(self, messages: "Messages") -> None:
        """Start the messages that are left: this rank's part of the answer pass is over."""
        messages.move(messages.count)

    def exchange(self, answers: Tensor) -> list[dist.Work]:
        """One message of `answers` [n, ...]; nothing on the ranks in between."""
        if self._group is None:
            return []
        sends = dist.get_rank() == self._last
        operation = dist.isend if sends else dist.irecv
        peer = self._first if sends else self._last
        # gloo sends each answer for itself, NCCL all of them at once
        return dist.batch_isend_irecv([dist.P2POp(operation, each, peer, self._group) for each in answers])

    def _warm_up(self) -> None:
        """An answer of one number: at the first message NCCL makes a communicator, and the host waits for both ends."""
        messages = self.open(1, torch.zeros(1, 1, device=device()))
        messages.end_pass()
        messages.close()


class BatchedChannel(RolloutChannel):
    """All answers in one message, after the pass."""

    def send(self, messages: "Messages", i: int) -> None:
        """No message is due during the pass."""

    def advance(self, messages: "Messages", forwards: int) -> None:
        """Here neither."""


class OverlappedChannel(RolloutChannel):
    """Messages of a few answers each while the pass goes on. Not for an interleaved pipeline."""

    def __init__(self) -> None:
        ranks = parallel_state.get_pipeline_model_parallel_world_size()
        self._between = ranks - 2
        self._window = max(WINDOW, ranks)
        super().__init__()

    def send(self, messages: "Messages", i: int) -> None:
        if (i + 1) % self._window == 0:
            messages.move(i + 1)

    def advance(self, messages: "Messages", forwards: int) -> None:
        answers = forwards - self._between
        if answers > 0 and answers % self._window == 0:
            messages.move(answers)

    def end_pass(self, messages: "Messages") -> None:
        for until in range(messages.moved + self._window, messages.count, self._window):
            messages.move(until)  # the last rank made a message of these
        super().end_pass(messages)


class Messages:
    """The messages of one answer pass. An answer is there behind `wait`, at both ends."""

    def __init__(self, channel: RolloutChannel, count: int, answers: Tensor | None) -> None:
        self.count = count
        self.moved = 0  # answers that are in a message by now
        self._channel, self._answers = channel, answers
        self._works: dict[int, list[dist.Work]] = {}  # by answer; those of one message share it

    def send(self, i: int) -> None:
        """On the last rank, with answer i in its place."""
        self._channel.send(self, i)

    def advance(self, forwards: int) -> None:
        """On the first rank, after `forwards` forwards of the pass."""
        self._channel.advance(self, forwards)

    def end_pass(self) -> None:
        """This rank's part of the answer pass is over."""
        self._channel.end_pass(self)

    def move(self, until: int) -> None:
        """One message of the answers before `until` that are in none yet; nothing on the ranks in between."""
        answers = range(self.moved, until)
        if self._answers is None or not answers:
            return
        self.moved = until
        works = self._channel.exchange(self._answers[answers.start : until])
        self._works |= dict.fromkeys(answers, works)

    def wait(self, i: int) -> None:
        """Until answer i has arrived at the first rank, or left the last one."""
        _finish([self._works.pop(i)])

    def close(self) -> None:
        """Finish all messages, also of answers that nobody asked for."""
        for i in list(self._works):
            self.wait(i)
        self._answers = None

    def __del__(self) -> None:
        """A message outlives a handle that was dropped: gloo hangs where one end of it is gone."""
        if self._works:
            self._channel.forgotten.append((list(self._works.values()), self._answers))


def _finish(messages: list[list[dist.Work]]) -> None:
    for works in messages:
        while works:
            works.pop().wait()


class Answers:
    """What one answer pass said, by micro-batch of queries: a lazy handle on the pipeline ranks that need it.

    The first and the last pipeline rank wait for a message when they need what is in it, others hold nothing.
    Each answer is [rows, C, H, W] float32, with rows as `branches` says. They are parts of one tensor, with zeros
    behind the last, and go all at once: `Engine.learn` closes its handles behind the last point that reads them, and
    whoever does not learn from one calls `close`.

    Args:
        shape: (C, H, W).
        channel: None without pipeline parallelism.
    """

    def __init__(self, branches: Branches, shape: tuple[int, ...], channel: RolloutChannel | None) -> None:
        self.branches, self.count = branches, branches.count
        self._ready: set[int] = set()
        self._all: Tensor | None = None  # [count + 1, stride, C, H, W]
        if channel is None or channel.is_end:
            self._all = torch.empty(self.count + 1, branches.stride, *shape, device=device())
            self._all[self.count].zero_()
            self._all[:, branches.rows :].zero_()
        self._messages = None if channel is None else channel.open(self.count, self._answers())

    def put(self, i: int, velocity: Tensor) -> None:
        """Answer i, as the last pipeline rank has computed it."""
        self._answer(i).copy_(velocity)
        if self._messages is None:
            self._ready.add(i)
        else:
            self._messages.send(i)

    def advance(self, forwards: int) -> None:
        """On the first rank, after `forwards` forwards of the pass."""
        if self._messages is not None:
            self._messages.advance(forwards)

    def end_pass(self) -> None:
        """This rank's part of the answer pass is over."""
        if self._messages is not None:
            self._messages.end_pass()

    def get(self, i: int) -> Tensor:
        """Answer i, waiting for its message where there are several pipeline ranks."""
        assert self._all is not None, (
            "these answers are closed, or this pipeline rank is between the two ends"
        )
        if i not in self._ready:
            assert self._messages is not None
            self._messages.wait(i)
            self._ready.add(i)
        return self._answer(i)

    def _answer(self, i: int) -> Tensor:
        answers = self._answers()
        assert answers is not None
        return answers[i]

    def _answers(self) -> Tensor | None:
        """[count + 1, rows, C, H, W], without the margins."""
        return None if self._all is None else self._all[:, : self.branches.rows]

    def close(self) -> None:
        """Finish the messages and free everything; again, it does nothing."""
        if self._messages is not None:
            self._messages.close()
        self._messages = self._all = None
        self._ready.clear()

    def rows_of(self, query: Tensor, wanted: Tensor) -> Tensor:
        """[M] int64: the rows of `velocities` where those of queries are, and a row of zeros where not `wanted` [M]."""
        branches = self.branches
        return torch.where(wanted, branches.row[query], self.count * branches.stride)

    def read_by(self, queries: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[list[int]]:
        """By micro-batch of points: the answers that hold the wanted ones of their queries."""
        branches = self.branches
        return [
            (branches.row[query[mask]] // branches.stride).unique().tolist()
            for query, mask in zip(queries, wanted, strict=True)
        ]

    def velocities(self, wanted: list[int]) -> tuple[Tensor | None, Tensor | None]:
        """(v_uncond, v_cond), both [A, C, H, W] with rows as `rows_of` says, when the wanted answers have arrived.

        None where nothing is wanted, or where v_uncond was not asked for.
        """
        if not wanted:
            return None, None
        for i in wanted:
            self.get(i)
        assert self._all is not None
        rows = self._all.flatten(0, 1)
        return rows[self.branches.size :] if self.branches.asked else None, rows


def make_channel(parallel: ParallelConfig) -> RolloutChannel | None:
    """The channel of this world, or None without pipeline parallelism. Collective over the world."""
    if parallel.pipeline_model_parallel_size == 1:
        return None
    return OverlappedChannel() if parallel.overlap_rollout else BatchedChannel()


def _last_to_first_group() -> tuple[dist.ProcessGroup | None, int, int]:
    """This rank's group of two (None on the ranks in between), and the global ranks of the last and the first."""
    mine = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    own = None
    for ranks in sorted({tuple(ranks) for ranks in everyone}):
        ends = [ranks[0], ranks[-1]]
        group = new_group(ends)  # every rank takes part in making every group
        if dist.get_rank() in ends:
            own = group
    return own, mine[-1], mine[0]
