"""Ranks that fail or go on together: what rank 0 does for all, and how one rank's failure ends the others."""

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch.distributed as dist

from soar_mega.data.info import DataError
from soar_mega.distributed import is_rank_zero

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


def end_process(error: BaseException) -> NoReturn:
    """Says what happened and leaves at once, so that no peer waits for this rank.

    A rank that raises cannot tell its peers, which may be inside any collective. Its death does: gloo connections
    break at once, torchrun ends all processes of a run within seconds of the first failure (and kills after 30 s those
    that do not follow its SIGTERM), srun does so with --kill-on-bad-exit. Python's own exit would first wait for
    communicators that will never finish. parallel.distributed_timeout_minutes bounds what is left.
    """
    agreed = isinstance(error, PeerFailure | DataError)  # all ranks raise these, and one message is enough
    if is_rank_zero() or not agreed:
        expected = isinstance(error, ValueError | OSError | PeerFailure) and not os.environ.get(
            "SOAR_MEGA_TRACEBACK"
        )
        logger.error("rank %d stops: %s", dist.get_rank(), error, exc_info=None if expected else error)
    for child in multiprocessing.active_children():
        child.kill()  # one that writes a checkpoint, or reads samples, would go on
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
