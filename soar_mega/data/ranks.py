"""This rank's part in reading: who reads for whom, and how all ranks fail or go on together.

Works without torch.distributed too: then this process is all there is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega import distributed
from soar_mega.data.info import DataError
from soar_mega.phases import phases
from soar_mega.upload import pinned

NAMED = 8  # ranks that say the same


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A rank's place: its replica, its pipeline stage, and the ranks that share its samples."""

    data_rank: int
    data_size: int
    first_stage: bool
    last_stage: bool
    group: dist.ProcessGroup | None  # the ranks of this pipeline stage that need the same samples
    source: int  # the one among them that reads, as a global rank
    leader: bool  # whether this is it

    @property
    def reads(self) -> bool:
        """Whether this rank reads samples at all; middle stages need their positions only."""
        return self.leader and (self.first_stage or self.last_stage)

    def share(self, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The reader's tensor on the device of every rank of the group. Collective over the group."""
        device = distributed.device()
        if self.leader:
            assert tensor is not None and tensor.shape == tuple(shape) and tensor.dtype == dtype
            received = pinned(tensor.contiguous(), device)
        else:
            received = torch.empty(tuple(shape), dtype=dtype, device=device)
        if self.group is not None:
            dist.broadcast(received, self.source, group=self.group)
        return received


def this_rank() -> Ranks:
    """This process's place in the world that `start_world` made, or in a world of one."""
    if not dist.is_initialized():
        return Ranks(
            data_rank=0, data_size=1, first_stage=True, last_stage=True, group=None, source=0, leader=True
        )
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_and_context_parallel_group()
    members = dist.get_process_group_ranks(group)
    return Ranks(
        data_rank=distributed.data_rank(),
        data_size=distributed.data_size(),
        first_stage=distributed.is_first_stage(),
        last_stage=distributed.is_last_stage(),
        group=group if len(members) > 1 else None,
        source=members[0],
        leader=dist.get_rank() == members[0],
    )


def agree(failures: dict[int, str], count: int, fatal: str | None = None) -> tuple[Tensor, list[str]]:
    """The failed places of a global batch, as seen by any rank: ([count] bool on the CPU, reasons). Collective.

    Args:
        failures: place in the global batch -> message, of this rank.
        fatal: why this rank cannot go on at all.

    Raises:
        DataError: on all ranks alike, when any of them cannot go on.
    """
    flags = torch.zeros(count + 1, dtype=torch.int32)
    flags[list(failures)] = 1
    flags[count] = int(fatal is not None)
    if dist.is_initialized():
        # on the CPU: the host would otherwise stop until the device has done its last step
        with phases.waiting():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    if not flags.any():
        return flags[:count].bool(), []
    # Messages travel only when there are some.
    fatals = [fatal]
    reasons = [failures]
    if dist.is_initialized():
        gathered: list[tuple[str | None, dict[int, str]]] = [(None, {})] * dist.get_world_size()
        dist.all_gather_object(gathered, (fatal, failures))
        fatals, reasons = [g[0] for g in gathered], [g[1] for g in gathered]
    if flags[count]:
        raise DataError("; ".join(_by_message(fatals)))
    merged = {place: message for part in reasons for place, message in part.items()}
    return flags[:count].bool(), [merged[place] for place in sorted(merged)]


def _by_message(fatals: Sequence[str | None]) -> list[str]:
    """Each message once, with the ranks that said it unless all did."""
    found = []
    for message in dict.fromkeys(m for m in fatals if m is not None):
        ranks = [str(rank) for rank, said in enumerate(fatals) if said == message]
        where = "" if len(ranks) == len(fatals) else f" (rank {', '.join(ranks[:NAMED])})"
        found.append(f"{message}{where}")
    return found
