"""Stop requests: one decision for all ranks."""

import os
import signal

from multirank import run_ranks

from soar_mega import distributed
from soar_mega.config import ParallelConfig
from soar_mega.training.signals import StopRequest


def votes(ask_rank: int) -> list[str | None]:
    distributed.start_world(ParallelConfig())
    with StopRequest(None) as stop:
        seen = [stop.reason()]
        if int(os.environ["RANK"]) == ask_rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        seen.append(stop.reason())
    with StopRequest(0.0 if int(os.environ["RANK"]) == ask_rank else 60.0) as late:
        seen.append(late.reason())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return seen


def test_a_signal_or_a_deadline_of_one_rank_stops_all() -> None:
    expected = [None, "signal SIGUSR1", "the end of train.exit_duration_in_mins"]
    assert run_ranks(votes, 2, 1) == [expected, expected]
