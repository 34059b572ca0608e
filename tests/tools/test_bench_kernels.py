"""The table of the kernels without a GPU: counted bytes, predicted times, JSON and picture."""

import json
import sys

import bench_kernels
import pytest
import torch
from torch.profiler import ProfilerActivity, profile


def test_predictions_without_a_gpu(tmp_path, monkeypatch, capsys):
    out = tmp_path / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--only", "512 px N=6", "--out", str(out)])
    bench_kernels.main()
    rows = {(row["name"], row["form"]): row for row in json.loads(out.read_text())["rows"]}
    elements = 4 * 16 * 64 * 64
    states = rows["rollout_renoise 512 px N=6", "fused"]
    # four float32 sources in, six bfloat16 states out; the rest are tables
    assert states["bytes"] == pytest.approx(elements * (4 * 4 + 6 * 2), rel=1e-3)
    assert all(
        rows[name, "eager"]["bytes"] > 2 * row["bytes"]
        for (name, form), row in rows.items()
        if form == "fused"
    )
    assert states["host_seconds"] is None and "predicted" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 1000


def test_host_time_is_of_calls_that_take_turns_over_inputs_of_their_own(monkeypatch):
    waits, made = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(made)))
    calls = [lambda number=number: made.append(number) for number in range(3)]
    seconds = bench_kernels.host_seconds(calls, repeats=4)
    assert 0 < seconds < 1e-3
    assert made == [number % 3 for number in range(bench_kernels.CALLS)] * 6  # 4 and 2 that warm up
    assert waits == [bench_kernels.CALLS * repeat for repeat in range(7)]
    make = bench_kernels.all_cases()["adaln FLUX both"]
    first, second = (make(torch.device("meta")) for _ in range(2))
    inputs = [set(map(id, case.fused.__closure__[1].cell_contents)) for case in (first, second)]
    assert len(inputs[0]) == 5 and not inputs[0] & inputs[1]


def test_device_time_counts_what_lay_on_the_device_alone():
    """The profile of a GPU has its kernels twice: as themselves, and as time of the calls that launched them."""

    class Event:
        def __init__(self, device, microseconds, annotation=False):
            self.device_type, self.self_device_time_total = device, microseconds
            self.is_user_annotation = annotation

    on_cpu, on_gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [
        Event(on_cpu, 30.0),
        Event(on_gpu, 10.0),
        Event(on_gpu, 20.0),
        Event(on_gpu, 30.0, annotation=True),
    ]
    assert bench_kernels.kernel_seconds(events) == pytest.approx(30e-6)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        torch.ones(3) + 1
    assert len(profiler.events()) and bench_kernels.kernel_seconds(profiler.events()) == 0.0
