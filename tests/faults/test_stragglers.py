"""A slow rank is named, and only when it is slow for some time."""

import logging
import os
import socket
import time

import torch.distributed as dist
from multirank import run_ranks

from soar_mega import distributed
from soar_mega.config import ParallelConfig
from soar_mega.faults.stragglers import PATIENCE, Stragglers
from soar_mega.phases import phases


def compared(slow: list[bool], factor: float) -> tuple[list[dict[str, float]], list[str]]:
    """Intervals of two steps on three ranks; rank 1 reads data slowly in some of them, and the others wait for it."""
    distributed.start_world(ParallelConfig())
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("soar_mega.faults.stragglers").addHandler(handler)
    stragglers, found = Stragglers(factor), []
    for is_slow in slow:
        for step in range(2):
            phases.begin_step(step, "agreement")
            phases.enter("data")
            time.sleep(0.12 if is_slow and os.environ["RANK"] == "1" else 0.03)
            with phases.waiting():
                dist.barrier()
            phases.enter("learn")
            time.sleep(0.01)
            phases.leave_step("checkpoint")
        found.append(stragglers.compare(2))
    return found, told


def test_a_slow_rank_is_named() -> None:
    results = run_ranks(compared, 3, [True, False] + [True] * PATIENCE, 1.5)
    found, told = results[0]
    assert results[1][0] == found and results[1][1] == results[2][1] == []
    slow, fast = found[0], found[1]
    assert 0.13 <= slow["timers/step-max"] < 0.3 and slow["timers/step-median"] < 0.1
    assert 0.04 <= fast["timers/step-min"] <= fast["timers/step-max"] < 0.12
    (warning,) = told
    assert warning.startswith(f"rank 1 on {socket.gethostname()} is slow: 1") and "(data 1" in warning
    assert f"for {PATIENCE} log intervals in a row" in warning


def test_nobody_is_slow_for_a_moment_or_without_a_factor() -> None:
    assert run_ranks(compared, 2, [True] * (PATIENCE - 1) + [False, True], 1.5)[0][1] == []
    assert run_ranks(compared, 2, [True] * PATIENCE, 0.0)[0][1] == []
