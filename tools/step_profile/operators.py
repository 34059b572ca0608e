"""Which operators and kernels a step spends its time in, by torch.profiler."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Json = dict[str, Any]

TOP = 25


def profiled(step: Callable[[], Any]) -> Json:
    """The operators and kernels that took most of one step, which the profiler itself makes slower.

    "kernel_seconds" is for how long at least one kernel ran on the GPU, None without one.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
    rows = [
        {
            "name": row.key,
            "calls": row.count,
            "host_seconds": row.self_cpu_time_total / 1e6,
            "device_seconds": row.self_device_time_total / 1e6,
        }
        for row in profiler.key_averages()
        if not row.is_user_annotation  # which lies over what it is named for
    ]
    clock = "device_seconds" if on_gpu else "host_seconds"
    kernels = [
        (event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return {
        "sorted_by": clock,
        "top": sorted(rows, key=lambda row: -row[clock])[:TOP],
        "kernel_seconds": covered(kernels) if on_gpu else None,
        "kernels": len(kernels),
    }


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of what intervals cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
