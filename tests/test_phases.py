"""Where a process is in its run, and how it waits for its peers."""

import pytest
import torch

from soar_mega.phases import Phases


class Device:
    """A device that is behind its host: an event is over when the device comes to it."""

    def __init__(self) -> None:
        self.now, self.told = 0.0, 0.0

    def event(self, enable_timing: bool) -> "Event":
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = self.device.told

    def query(self) -> bool:
        return self.at <= self.device.now

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, end: "Event") -> float:
        assert self.query() and end.query(), "not both events are over"
        return 1000.0 * (end.at - self.at)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    def stops_the_host(*_: object) -> None:
        raise AssertionError("the host stops for the device")

    device = Device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", stops_the_host)
    monkeypatch.setattr(torch.cuda, "current_stream", stops_the_host)
    return device


def test_times_are_those_of_the_device_and_the_host_waits_for_none(device: Device) -> None:
    phases = Phases()
    phases.begin_step(1, "learn")
    device.told += 3.0  # its own work
    with phases.waiting():
        device.told += 10.0  # for others
    device.told += 1.0
    phases.enter("optimizer")
    device.told += 2.0
    phases.leave_step("report")
    assert device.now == 0.0
    assert phases.take_seconds() == {"learn": 4.0, "optimizer": 2.0}
    assert phases.take_seconds() == {} and device.now == device.told


def test_a_process_waits_when_its_device_does(device: Device) -> None:
    """A host that is stopped in a wait is not to blame for it, unless its device still computes."""
    phases = Phases()
    phases.begin_step(1, "learn")
    device.told += 3.0
    with phases.waiting():
        assert not phases.is_waiting  # the device has its own work to do
        device.now = 3.0
        assert phases.is_waiting
        device.told += 10.0
    assert phases.is_waiting  # the host is out of it, the device not
    phases.enter("optimizer")
    assert phases.is_waiting
    device.now = 13.0
    assert not phases.is_waiting
