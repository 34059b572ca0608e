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

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from soar_mega.config import ParallelConfig
from soar_mega.distributed import device, new_group

WINDOW = 4  # answers in a message of the overlapped channel, or one for each pipeline rank


class RolloutChannel(ABC):
    """Carries answer i from the last pipeline rank to the first of the same tensor-, context- and data-parallel rank.

    In an answer pass all ranks of the pipeline call `open` and at the end `end_pass`; in between the last one calls
    `send` with each answer in turn, and the first one `advance` before each forward. Afterwards `wait` hands out an
    answer at both ends.
    """

    def __init__(self) -> None:
        self._group, self._last, self._first = _last_to_first_group()
        self._count = 0
        self._shape: tuple[int, ...] = ()
        self._moved = 0  # answers that are in a message by now
        self._answers: dict[int, Tensor] = {}
        self._messages: dict[int, list[dist.Work]] = {}  # by answer; those of one message share it
        self._warm_up()

    def open(self, count: int, shape: tuple[int, ...]) -> None:
        """Announce `count` answers, each float32 of `shape`."""
        assert not self._answers, "the channel is still carrying earlier answers"
        self._count, self._shape, self._moved = count, shape, 0

    def send(self, i: int, velocity: Tensor) -> None:
        """Answer i, as the last rank has computed it; returns at once."""
        assert velocity.dtype == torch.float32 and tuple(velocity.shape) == self._shape
        self._answers[i] = velocity

    @abstractmethod
    def advance(self, forwards: int) -> None:
        """On the first rank, after `forwards` forwards of the pass: start the messages that are due."""

    def end_pass(self) -> None:
        """Start the messages that are left: this rank's part of the answer pass is over."""
        self._move(self._count)

    def wait(self, i: int) -> Tensor:
        """Answer i, when it has arrived at the first rank, or left the last one. The channel lets go of it."""
        works = self._messages.pop(i)
        while works:
            works.pop().wait()
        return self._answers.pop(i)

    def close(self) -> None:
        """Finish all messages, also of answers that nobody asked for."""
        for i in list(self._messages):
            self.wait(i)
        self._answers.clear()

    def _move(self, until: int) -> None:
        """One message of the answers before `until` that are in none yet; nothing on the ranks in between."""
        answers = range(self._moved, until)
        if self._group is None or not answers:
            return
        self._moved = until
        sends = dist.get_rank() == self._last
        if not sends:
            for i in answers:
                self._answers[i] = torch.empty(self._shape, dtype=torch.float32, device=device())
        operation = dist.isend if sends else dist.irecv
        peer = self._first if sends else self._last
        # gloo sends each answer for itself, told apart by its tag; NCCL all of them at once
        parts = [dist.P2POp(operation, self._answers[i], peer, self._group, tag=i) for i in answers]
        self._messages |= dict.fromkeys(answers, dist.batch_isend_irecv(parts))

    def _warm_up(self) -> None:
        """An answer of one number: at the first message NCCL makes a communicator, and the host waits for both ends."""
        self.open(1, (1,))
        if dist.get_rank() == self._last:
            self.send(0, torch.zeros(1, device=device()))
        self.end_pass()
        self.close()


class BatchedChannel(RolloutChannel):
    """All answers in one message, after the pass."""

    def advance(self, forwards: int) -> None:
        """No message is due during the pass."""


class OverlappedChannel(RolloutChannel):
    """Messages of a few answers each while the pass goes on. Not for an interleaved pipeline."""

    def __init__(self) -> None:
        ranks = parallel_state.get_pipeline_model_parallel_world_size()
        self._between = ranks - 2
        self._window = max(WINDOW, ranks)
        super().__init__()

    def send(self, i: int, velocity: Tensor) -> None:
        super().send(i, velocity)
        if (i + 1) % self._window == 0:
            self._move(i + 1)

    def advance(self, forwards: int) -> None:
        answers = forwards - self._between
        if answers > 0 and answers % self._window == 0:
            self._move(answers)

    def end_pass(self) -> None:
        for until in range(self._moved + self._window, self._count, self._window):
            self._move(until)  # the last rank made a message of these
        super().end_pass()


class Answers:
    """The answers of a batch, by micro-batch of samples: a lazy handle on the stages that need them.

    The first and the last pipeline rank wait for a message when they need what is in it, others hold nothing.
    Each answer is [rows, C, H, W] float32: v_cond of the micro-batch's samples, then their v_uncond where wanted.
    """

    def __init__(self, micro_batch_size: int, unconditional: bool, channel: RolloutChannel | None) -> None:
        self.micro_batch_size = micro_batch_size
        self.unconditional = unconditional
        self._channel = channel  # None without pipeline parallelism: the answers are then a local list
        self._kept: dict[int, Tensor] = {}

    def put(self, i: int, velocity: Tensor) -> None:
        """Answer i, as the last pipeline rank has computed it."""
        if self._channel is None:
            self._kept[i] = velocity
        else:
            self._channel.send(i, velocity)

    def get(self, i: int) -> Tensor:
        """Answer i, waiting for its message where there are several pipeline ranks."""
        if i not in self._kept:
            assert self._channel is not None
            self._kept[i] = self._channel.wait(i)
        return self._kept[i]

    def drop(self, i: int) -> None:
        """Free answer i: no later point needs it."""
        self._kept.pop(i, None)

    def close(self) -> None:
        """Finish the messages and free what is left."""
        if self._channel is not None:
            self._channel.close()
        self._kept.clear()

    def velocities(self, sample: Tensor, wanted: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(v_uncond, v_cond), each [M, C, H, W], of the samples at `sample` [M]; zero where `wanted` [M] is False.

        Waits only for the wanted ones. None where nothing is wanted, or where v_uncond was not asked for. Views of an
        answer where the samples are neighbours in one.
        """
        if not bool(wanted.any()):
            return None, None
        size = self.micro_batch_size
        first, last = int(sample[0]), int(sample[-1])
        neighbours = torch.equal(sample, torch.arange(first, last + 1))
        if neighbours and first // size == last // size and bool(wanted.all()):
            answer = self.get(first // size)
            start, stop = first % size, last % size + 1
            return answer[size + start : size + stop] if self.unconditional else None, answer[start:stop]
        pieces = (sample // size).where(wanted, -1)
        v_uncond: Tensor | None = None
        v_cond: Tensor | None = None
        for i in sorted({int(piece) for piece in pieces} - {-1}):
            answer = self.get(i)
            if v_cond is None:
                v_cond = answer.new_zeros(len(sample), *answer.shape[1:])
                v_uncond = torch.zeros_like(v_cond) if self.unconditional else None
            here = (pieces == i).nonzero().flatten()
            row = sample[here] % size
            v_cond[here] = answer[row]
            if v_uncond is not None:
                v_uncond[here] = answer[size + row]
        return v_uncond, v_cond


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
        group = new_group([ranks[0], ranks[-1]])  # every rank takes part in making every group
        if list(ranks) == mine and dist.get_rank() in (ranks[0], ranks[-1]):
            own = group
    return own, mine[-1], mine[0]
