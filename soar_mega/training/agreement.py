"""Ranks that fail or go on together: what rank 0 does for all, and what each rank does for itself."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from soar_mega.distributed import device, is_rank_zero

T = TypeVar("T")


def on_rank_zero(action: Callable[[], T]) -> T:
    """The result of `action` run on rank 0, on every rank; what it raises is raised on every rank. Collective."""
    outcome: list[object] = [None, None]
    if is_rank_zero():
        try:
            outcome[0] = action()
        except (ValueError, OSError, RuntimeError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        assert isinstance(outcome[1], BaseException)
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Runs a block that each rank does for itself; when it fails on any of them, all ranks raise. Collective at its end.

    Only for blocks without collectives: a rank that fails inside one leaves its peers waiting in it.
    """
    failure: Exception | None = None
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        failure = error
    failed = torch.tensor([int(failure is not None)], dtype=torch.int32, device=device())
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failure is not None:
        raise failure
    if failed.item():
        raise RuntimeError(f"{what} failed on another rank; its message says why")
