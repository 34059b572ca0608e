"""Where a process is in its run, and how it waits for its peers."""

import pytest
import torch

from soar_mega.phases import Phases


class Stream:
    """A stream of computations; says when it is waited for."""

    def __init__(self) -> None:
        self.waits = 0

    def record_event(self) -> "Stream":
        return self

    def synchronize(self) -> None:
        self.waits += 1


def test_waiting_finishes_what_was_computed_and_not_the_messages_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def whole_device() -> None:
        raise AssertionError("a message to the device may need this process to go on")

    stream, phases = Stream(), Phases()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", whole_device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    with phases.waiting():
        assert phases.is_waiting and stream.waits == 1
    assert not phases.is_waiting and stream.waits == 2
