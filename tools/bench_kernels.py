"""Times the kernels on a GPU, or predicts from counted bytes what they will take on one.

    python tools/bench_kernels.py                   all operations at SD3.5 and FLUX shapes
    python tools/bench_kernels.py --only loss --out /tmp/bench.json

On CUDA: each operation fused, eager, and eager under torch.compile. Device time is that of its kernels alone, by the
profiler, over inputs that take turns, so that none is in the L2 cache any more; the bandwidth and its share of a copy's
follow from it. Host time is what a call takes before it returns, with nothing waited for. On the CPU: counted launches
and bytes (the meta device stands for the GPU, see kernel_traffic.py), and the time that the bytes take at a stated
bandwidth. Writes JSON and a roofline picture next to it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from arguments import result_file
from kernel_cases import Case, all_cases
from kernel_traffic import Counter, Traffic
from origin import device_slug, origin
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

H100_COPY = 2.8e12  # bytes per second that a large copy reaches on an H100 SXM, for predictions without a GPU
LAUNCH_SECONDS = 4e-6  # of one small launch, for the same
BEYOND_CACHE = 2**28  # bytes that inputs taking turns move between two uses of the same: some L2 caches
CALLS = 24  # that are measured in a row: few, lest the queue of launches fills and makes the host wait


@dataclass(kw_only=True)
class Row:
    """What was measured or predicted of one form of one case."""

    name: str
    form: str
    launches: int
    bytes: int
    device_seconds: float
    host_seconds: float | None  # None: not measured

    @property
    def bandwidth(self) -> float:
        return self.bytes / self.device_seconds


def main() -> None:
    args = parse_arguments()
    gpu = torch.cuda.is_available()
    cases = {name: make for name, make in all_cases().items() if args.only in name}
    path = result_file(args.out, f"{device_slug()}-kernels")
    copy = copy_bandwidth() if gpu else H100_COPY
    rows: list[Row] = []
    for name, make in cases.items():
        rows += measured(name, make, args.forms) if gpu else predicted(name, make, copy)
    device = torch.cuda.get_device_name() if gpu else "none: predicted for an H100"
    print_table(rows, copy, device)
    report = {
        **origin("bench_kernels"),
        "device": device,
        "copy_bandwidth": copy,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    draw_roofline(rows, copy, device, path.with_suffix(".png"))
    print(f"\nWritten to {path} and {path.with_suffix('.png')}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=["fused", "eager", "torch.compile"],
        default=["fused", "eager", "torch.compile"],
        help="to measure on a GPU (default: all; torch.compile takes some seconds per case)",
    )
    parser.add_argument("--out", help="where to write the JSON (default: benchmarks/results/<date>-...)")
    args = parser.parse_args()
    if not any(args.only in name for name in all_cases()):
        parser.error(f"--only {args.only!r} is in none of these names: {', '.join(all_cases())}")
    return args


def predicted(name: str, make: Callable[[torch.device], Case], copy: float) -> list[Row]:
    """Counted launches and bytes, and the time they take at the bandwidth of a copy plus that of the launches."""
    rows, case = [], make(torch.device("meta"))
    for form, call in (("fused", case.fused), ("eager", case.eager)):
        found = counted(call)
        seconds = found.bytes / copy + found.launches * LAUNCH_SECONDS
        rows.append(Row(name=name, form=form, device_seconds=seconds, host_seconds=None, **asdict(found)))
    return rows


def measured(name: str, make: Callable[[torch.device], Case], forms: Sequence[str]) -> list[Row]:
    """Times of the forms; all are held against the bytes that the fused one cannot avoid."""
    moved = counted(make(torch.device("meta")).fused)
    cases = beyond_cache(make, moved)
    rows = []
    for form in forms:
        calls = [calls_of(case)[form] for case in cases]
        host = host_seconds(calls)
        rows.append(
            Row(
                name=name,
                form=form,
                launches=moved.launches if form == "fused" else 0,
                bytes=moved.bytes,
                device_seconds=device_seconds(calls),
                host_seconds=host,
            )
        )
    return rows


def beyond_cache(make: Callable[[torch.device], Case], moved: Traffic) -> list[Case]:
    """A case several times, so that no input is in the cache any more when its turn comes; `moved`: by one of them."""
    copies = min(CALLS, max(2, -(-BEYOND_CACHE // moved.bytes)))
    return [make(torch.device("cuda")) for _ in range(copies)]


def calls_of(case: Case) -> dict[str, Callable[[], object]]:
    """By form."""
    return {"fused": case.fused, "eager": case.eager, "torch.compile": torch.compile(case.eager)}


def counted(call: Callable[[], object]) -> Traffic:
    """Of a case whose tensors are on the meta device."""
    with Counter() as counter:
        call()
    return counter.traffic


def in_turn(calls: Sequence[Callable[[], object]]) -> None:
    for number in range(CALLS):
        calls[number % len(calls)]()


def host_seconds(calls: Sequence[Callable[[], object]], repeats: int = 10) -> float:
    """Median over repeats of the time until a call returns; the device is waited for between the repeats alone."""
    times = []
    for repeat in range(repeats + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        in_turn(calls)
        taken = (time.perf_counter() - started) / CALLS
        if repeat >= 2:  # the first ones compile and allocate
            times.append(taken)
    torch.cuda.synchronize()
    return statistics.median(times)


def device_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """What the kernels and copies of a call take on the device, without the gaps between them."""
    in_turn(calls)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        in_turn(calls)
        torch.cuda.synchronize()
    return kernel_seconds(profiler.events()) / CALLS


def kernel_seconds(events: Iterable[Any]) -> float:
    """Of a profile: what lay on the device, each once."""
    on_device = [
        event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return sum(event.self_device_time_total for event in on_device) / 1e6


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy beyond the L2 cache, by its time on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / device_seconds([lambda: target.copy_(source)])


def print_table(rows: list[Row], copy: float, device: str) -> None:
    print(f"{device}; copy bandwidth {copy / 1e9:.0f} GB/s")
    print(
        f"{'operation':36} {'form':14} {'launches':>8} {'MiB':>9} {'device us':>10} {'host us':>8} "
        f"{'GB/s':>7} {'of copy':>7}"
    )
    for r in rows:
        host = "" if r.host_seconds is None else f"{r.host_seconds * 1e6:.1f}"
        print(
            f"{r.name:36} {r.form:14} {r.launches or '':>8} {r.bytes / 2**20:9.1f} {r.device_seconds * 1e6:10.1f} "
            f"{host:>8} {r.bandwidth / 1e9:7.0f} {r.bandwidth / copy:7.0%}"
        )


def draw_roofline(rows: list[Row], copy: float, device: str, path: Path) -> None:
    """Bandwidth over bytes: these operations compute little, so the roof is the copy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for form in dict.fromkeys(row.form for row in rows):
        points = [(row.bytes / 2**20, row.bandwidth / 1e9) for row in rows if row.form == form]
        axes.loglog(*zip(*points, strict=True), "o", label=form)
    axes.axhline(copy / 1e9, color="grey", label="copy")
    axes.set(
        xlabel="MiB moved",
        ylabel="GB/s",
        title=device,
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
