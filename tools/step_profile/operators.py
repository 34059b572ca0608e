"""What a step spends its time on by torch.profiler: operators on the host, kernels on the GPU."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from step_profile import kernels
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Json = dict[str, Any]

TOP = 25


def profiled(step: Callable[[], Any], step_seconds: float) -> tuple[Json, Json | None]:
    """The operators that took most of one step's time on the host, which the profiler itself makes slower, and the
    GPU's kernels; these are None without a GPU.

    Args:
        step_seconds: of a step that is not profiled.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
    ran = kernels.of_a_step(on_device(profiler.events()), step_seconds) if on_gpu else None
    return {"top": on_host(profiler.key_averages())}, ran


def on_host(averages: Iterable[Any]) -> list[Json]:
    """The operators that took most, each without those that it called."""
    rows = [
        {"name": row.key, "calls": row.count, "host_seconds": row.self_cpu_time_total / 1e6}
        for row in averages
        if row.device_type == DeviceType.CPU and not row.is_user_annotation
    ]
    return sorted(rows, key=lambda row: -row["host_seconds"])[:TOP]


def on_device(events: Iterable[Any]) -> list[kernels.Ran]:
    """What ran on the GPU itself: neither what a range of the host is called there, nor what the profiler says of
    itself ("Command Buffer Full"), which it puts down as work of the GPU."""
    return [
        kernels.Ran(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
