"""Stop requests: one decision for all ranks."""

import logging
import os
import signal
import subprocess

import pytest
from multirank import run_ranks

from soar_mega import distributed
from soar_mega.config import ParallelConfig
from soar_mega.faults.signals import StopRequest, held_back


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


def test_ctrl_c_is_a_request_to_stop_and_a_second_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="soar_mega")
    distributed.start_world(ParallelConfig())
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(None) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason() == "signal SIGINT" and "press it again" in caplog.text
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)  # the handler runs before this returns
    assert signal.getsignal(signal.SIGINT) is before


def test_held_back_signals_arrive_afterwards_and_not_in_processes_started_meanwhile() -> None:
    received: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with held_back():
            child = subprocess.Popen(["sleep", "0.2"])
            for pid in (child.pid, os.getpid()):
                os.kill(pid, signal.SIGUSR1)
            assert child.wait() == 0
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, previous)
