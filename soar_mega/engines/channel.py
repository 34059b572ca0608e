"""How the answers of the rollout pass get from the last pipeline stage, which computes them, to the first.

The messages move on groups of two ranks while the pipeline goes on with other micro-batches.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from soar_mega.distributed import device, is_first_stage, is_last_stage

# On CUDA, receives wait on a stream in the order of the sends: a few ahead hide the latency, all would hold memory.
CUDA_WINDOW = 4


class RolloutChannel:
    """Sends answer i from the last stage to the first stage of the same tensor-, context- and data-parallel rank.

    Both ends call `open` with the same arguments, then `send` on the last stage and `wait` on the first. On gloo all
    receives are posted when the channel opens and matched by tag; on CUDA they are posted a few ahead, on a stream
    of their own, and matched by order.
    """

    def __init__(self) -> None:
        self._group, self._source, self._target = _last_to_first_group()
        self._stream = torch.cuda.Stream() if device().type == "cuda" else None
        self._count = 0
        self._shape: tuple[int, ...] = ()
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._posted: dict[int, tuple[dist.Work, Tensor]] = {}
        self._next = 0

    def open(self, count: int, shape: tuple[int, ...]) -> None:
        """Announce `count` answers, each float32 of `shape`."""
        assert not self._sent and not self._posted, "the channel is still carrying earlier answers"
        self._count, self._shape, self._next = count, shape, 0
        if is_first_stage():
            self._post(count if self._stream is None else CUDA_WINDOW)

    def send(self, i: int, velocity: Tensor) -> None:
        """Start sending answer i; returns at once."""
        assert is_last_stage() and velocity.dtype == torch.float32 and tuple(velocity.shape) == self._shape
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work = dist.isend(velocity, self._target, group=self._group, tag=i)
        assert work is not None
        self._sent = [(w, v) for w, v in self._sent if not w.is_completed()]
        self._sent.append((work, velocity))  # a tensor must live until it has been sent

    def wait(self, i: int) -> Tensor:
        """Answer i, when it has arrived."""
        assert is_first_stage()
        self._post(i + 1 + CUDA_WINDOW)
        work, velocity = self._posted.pop(i)
        work.wait()
        return velocity

    def close(self) -> None:
        """Finish all messages, also the answers that nobody asked for."""
        self._post(self._count)
        for work, _ in [*self._posted.values(), *self._sent]:
            work.wait()
        self._posted.clear()
        self._sent.clear()

    def _post(self, until: int) -> None:
        """Post the receives of all answers before `until`; nothing off the first stage."""
        if not is_first_stage():
            return
        while self._next < min(until, self._count):
            with torch.cuda.stream(self._stream):
                buffer = torch.empty(self._shape, dtype=torch.float32, device=device())
                work = dist.irecv(buffer, self._source, group=self._group, tag=self._next)
            assert work is not None
            if self._stream is not None:
                buffer.record_stream(torch.cuda.current_stream())
            self._posted[self._next] = (work, buffer)
            self._next += 1


class Answers:
    """The answers of a batch, by micro-batch of samples: a lazy handle on the stages that need them.

    The last stage keeps what it computed, the first one waits for a message when it needs it, others hold nothing.
    Each answer is [rows, C, H, W] float32: v_cond of the micro-batch's samples, then their v_uncond where wanted.
    """

    def __init__(self, micro_batch_size: int, unconditional: bool, channel: RolloutChannel | None) -> None:
        self.micro_batch_size = micro_batch_size
        self.unconditional = unconditional
        self._channel = channel  # None without pipeline parallelism: the answers are then a local list
        self._kept: dict[int, Tensor] = {}

    def put(self, i: int, velocity: Tensor) -> None:
        """Answer i, as the last stage has computed it."""
        self._kept[i] = velocity
        if self._channel is not None:
            self._channel.send(i, velocity)

    def get(self, i: int) -> Tensor:
        """Answer i, waiting for it where it was computed elsewhere."""
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


def make_channel() -> RolloutChannel | None:
    """The channel of this world, or None without pipeline parallelism. Collective over the world."""
    return RolloutChannel() if parallel_state.get_pipeline_model_parallel_world_size() > 1 else None


def _last_to_first_group() -> tuple[dist.ProcessGroup | None, int, int]:
    """This rank's group of two (None on middle stages), and the global ranks of the last and the first stage."""
    mine = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    own = None
    for ranks in sorted({tuple(ranks) for ranks in everyone}):
        group = dist.new_group([ranks[0], ranks[-1]])  # every rank takes part in making every group
        if list(ranks) == mine and dist.get_rank() in (ranks[0], ranks[-1]):
            own = group
    return own, mine[-1], mine[0]
