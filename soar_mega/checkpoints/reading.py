"""Tensors of a checkpoint: compared by name and shape before any is read, all at once or a few at a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from soar_mega.checkpoints.checkpoint import FAILURES, reason
from soar_mega.checkpoints.strict import check_keys
from soar_mega.distributed import device, is_rank_zero
from soar_mega.engines.on_demand import OnDemand
from soar_mega.faults.agreement import PeerFailure

READ_AT_ONCE = 2**30  # bytes; each read costs a look at the list of all tensors


def read_tensors(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What dist_checkpointing finds in a checkpoint for a sharded state dict. Collective.

    In the place of an OnDemand comes a Stream.

    Raises:
        ValueError: names or shapes differ, which is found out before anything is loaded, or a rank cannot read it. On
            the other ranks than the first it is a PeerFailure.
    """
    check_keys(folder, state)
    # on its own first: a rank that failed at it inside `load` would leave the others waiting
    _read_together(folder, lambda: _read_common_state(folder))
    at_once, streams = _split(folder, state)
    return _joined(_read(folder, at_once), streams)


class Stream:
    """The tensors of an OnDemand whose names have been checked.

    Args:
        at_once: bytes that are read together; a tensor that is larger is read alone.
    """

    def __init__(self, folder: Path, wanted: OnDemand, at_once: int | None = None) -> None:
        self._folder, self._wanted = folder, wanted
        self._at_once = READ_AT_ONCE if at_once is None else at_once

    def items(self) -> Iterator[tuple[str, Any]]:
        """Each name with its tensor, or its dict of them, once and in order.

        Collective over the world, each of whose ranks may want others, but asks for all of them.
        """
        groups = list(self._groups())
        reads = torch.tensor(len(groups), device=device())
        dist.all_reduce(reads, op=dist.ReduceOp.MAX)
        for n in range(int(reads)):
            read = self._read(groups[n] if n < len(groups) else [])
            for name in list(read):
                yield name, read.pop(name)

    def _read(self, names: list[str]) -> dict[str, Any]:
        wanted = {name: _with_room(self._wanted[name]) for name in names}
        return _read(self._folder, {"tensors": wanted}).get("tensors", {})

    def _groups(self) -> Iterator[list[str]]:
        group: list[str] = []
        room = self._at_once
        for name, wanted in self._wanted.items():
            nbytes = size(wanted)
            if group and nbytes > room:
                yield group
                group, room = [], self._at_once
            group.append(name)
            room -= nbytes
        if group:
            yield group


def size(wanted: ShardedTensor | dict[str, ShardedTensor]) -> int:
    """Bytes of this rank's part of a sharded tensor, or of some."""
    return sum(tensor.data.nbytes for tensor in nested_values({"wanted": wanted}))


def _with_room(wanted: ShardedTensor | dict[str, ShardedTensor]) -> Any:
    if isinstance(wanted, dict):
        return {name: _with_room(tensor) for name, tensor in wanted.items()}
    return replace(wanted, data=torch.empty(wanted.local_shape, dtype=wanted.dtype))


def _split(folder: Path, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is read at once, and the streams of the rest, both at their places in the state."""
    at_once: dict[str, Any] = {}
    streams: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, OnDemand):
            streams[key] = Stream(folder, value)
        elif isinstance(value, dict):
            at_once[key], streams[key] = _split(folder, value)
        else:
            at_once[key] = value
    return at_once, streams


def _joined(read: dict[str, Any], streams: dict[str, Any]) -> dict[str, Any]:
    """dist_checkpointing leaves out dicts that hold nothing to read."""
    joined = dict(read)
    for key, value in streams.items():
        joined[key] = _joined(joined.get(key, {}), value) if isinstance(value, dict) else value
    return joined


def _read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    return _read_together(folder, lambda: dist_checkpointing.load(state, str(folder)))


def _read_together(folder: Path, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `read` gives on this rank; fails on all ranks where it fails on one. Collective.

    From megatron-core 0.18 on the ranks read without each other.
    """
    state, failure = {}, None
    try:
        state = read()
    except FAILURES as error:
        failure = error
    reports: list[tuple[int, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, None if failure is None else _report(failure))
    for rank, report in enumerate(reports):
        if report is not None:
            named, said = report
            # to torch a rank that reads without the others is number 0
            where = named if reports[named] is not None else rank
            message = f"{folder}: this checkpoint cannot be read (rank {where}: {said})"
            raise (ValueError if is_rank_zero() else PeerFailure)(message) from failure
    return state


def _report(failure: BaseException) -> tuple[int, str]:
    """The rank where a read failed, and why."""
    if isinstance(failure, CheckpointException) and failure.failures:
        rank, (inner, _) = next(iter(failure.failures.items()))
        return rank, reason(inner)
    return dist.get_rank(), reason(failure)


def _read_common_state(folder: Path) -> dict[str, Any]:
    """What is no tensor: in common.pt, and from megatron-core 0.19 on among the tensors."""
    try:
        return dist_checkpointing.load_common_state_dict(str(folder))
    except AttributeError as error:  # so megatron-core 0.16 fails where there is no such file
        raise FileNotFoundError(f"{folder / 'common.pt'} is missing") from error
