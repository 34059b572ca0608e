"""Ranks that fail or go on together: what rank 0 does for all, and how one rank's failure ends the others."""

import contextlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import torch.distributed as dist

from soar_mega import distributed
from soar_mega.config import Recipe
from soar_mega.data.info import DataError
from soar_mega.distributed import is_rank_zero
from soar_mega.faults.limits import collective_timeout

logger = logging.getLogger(__name__)

T = TypeVar("T")


class PeerFailure(RuntimeError):
    """This rank stops because another one failed, and that one says why."""


def on_rank_zero(action: Callable[[], T]) -> T:
    """The result of `action` run on rank 0, on every rank. Collective.

    Raises:
        PeerFailure: on the other ranks, when the action raised on rank 0.
    """
    outcome: list[object] = [None, None]
    failure: Exception | None = None
    if is_rank_zero():
        try:
            outcome[0] = action()
        except (ValueError, OSError, RuntimeError) as error:
            failure = error
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise PeerFailure(f"rank 0 failed: {outcome[1]}")
    return outcome[0]  # type: ignore[return-value]


def on_all_ranks(action: Callable[[], T]) -> T:
    """The result of `action`, which every rank does. Collective, and whatever is collective in it fails on all ranks.

    Raises:
        PeerFailure: on the ranks where it went well, when the action raised on another.
    """
    failure: Exception | None = None
    try:
        result = action()
    except (ValueError, OSError, RuntimeError) as error:
        failure = error
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, str(failure) if failure else None)
    if failure is not None:
        raise failure
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise PeerFailure(f"rank {rank} failed: {reason}")
    return result


@contextlib.contextmanager
def world(recipe: Recipe) -> Iterator[None]:
    """Starts the world of a run and stops it; an exception ends the process where there are others (end_process)."""
    try:
        timeout = collective_timeout(recipe.train, int(os.environ.get("WORLD_SIZE", "1")))
        distributed.start_world(recipe.parallel, timeout)
        yield
    except Exception as error:
        if dist.is_initialized() and dist.get_world_size() > 1:
            end_process(error)
        distributed.stop_world()
        raise
    distributed.stop_world()


def end_process(error: Exception) -> NoReturn:
    """Says what happened and leaves at once, so that no peer waits for this rank.

    For failures before a watchdog is there: gloo connections break with the process, torchrun ends all processes of a
    run within seconds of the first failure (and kills after 30 s those that do not follow its SIGTERM), srun does so
    with --kill-on-bad-exit. The timeout of collectives (limits.py) bounds what is left.
    """
    if not is_quiet(error):
        say_why(error)
    leave()


def is_quiet(error: BaseException) -> bool:
    """Whether rank 0 raises the same, so that this rank need not say it."""
    return isinstance(error, PeerFailure | DataError) and not is_rank_zero()


def say_why(error: Exception, where: str = "") -> None:
    """Logs why this rank stops; with the traceback unless a user can set it right."""
    expected = isinstance(error, ValueError | OSError | PeerFailure)
    with_trace = not expected or os.environ.get("SOAR_MEGA_TRACEBACK")
    logger.error("rank %d stops%s: %s", dist.get_rank(), where, error, exc_info=error if with_trace else None)


def leave() -> NoReturn:
    """Ends this process; Python's own exit would first wait for communicators that will never finish."""
    for child in multiprocessing.active_children():
        child.kill()  # one that writes a checkpoint, or reads samples, would go on
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
