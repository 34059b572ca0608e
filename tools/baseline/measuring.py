"""Arms are measured: in turns on the CPU, one after the other on a GPU."""

import statistics
import time
from dataclasses import dataclass

import torch
from baseline.case import Case
from baseline.published_arm import OneForward
from baseline.rows import Row
from baseline.worker import Failed, Worker

from soar_mega.gpus import peak_tflops
from soar_mega.models.common.flops import Tokens, Work, forward_work, image_tokens, step_work
from soar_mega.models.family import read_sizes
from soar_mega.training.throughput import least_seconds


@dataclass(kw_only=True)
class Result:
    """What was measured of one row, or why it could not be. Ratios are of samples per second, to the first row that
    ran; where arms take turns they are taken round by round.
    """

    name: str
    micro_batch: int
    seconds: list[float]
    samples_per_second: float | None = None
    ratio: float | None = None
    ratio_range: tuple[float, float] | None = None
    peak_memory: int | None = None
    tflops: float | None = None  # of the method's work per second
    mfu: float | None = None  # of the device's peak; None where that is unknown
    forward_units: float | None = None  # counted, on the CPU alone
    failure: str | None = None


def fastest(row: Row) -> Row:
    """At the size with the shortest second step."""
    if len(row.arms) == 1:
        return row
    times = {}
    for size, arm in row.arms.items():
        worker = Worker(row.name)
        worker.build(arm)
        worker.step()
        times[size] = min(worker.step(), worker.step())
        worker.close()
        print(f"{row.name.strip()}, micro-batch {size}: {times[size]:.2f} s per step", flush=True)
    return row.at(min(times, key=lambda size: times[size]))


def measure_in_turns(case: Case, rows: list[Row], repeats: int) -> list[Result]:
    """Warms every arm up with two steps, then lets them take turns. Every row has one size."""
    unit = count_unit(case)
    workers = [Worker(row.name) for row in rows]
    for row, worker in zip(rows, workers, strict=True):
        (arm,) = row.arms.values()
        worker.build(arm)
        worker.step()
        worker.step()
    seconds: list[list[float]] = [[] for _ in rows]
    for turn in range(repeats):
        for taken, worker in zip(seconds, workers, strict=True):
            taken.append(worker.step())
        print(f"round {turn + 1}/{repeats} done", flush=True)
    results = []
    for row, taken, worker in zip(rows, seconds, workers, strict=True):
        (size,) = row.arms
        result = result_of(case, row, size, taken, worker.peak_memory())
        ratios = [first / mine for first, mine in zip(seconds[0], taken, strict=True)]
        result.ratio, result.ratio_range = statistics.median(ratios), (min(ratios), max(ratios))
        result.forward_units = worker.flops() / unit / case.batch_size
        results.append(result)
        worker.close()
    return results


def measure_alone(case: Case, rows: list[Row], repeats: int, row_seconds: float) -> list[Result]:
    """One row after the other, each in a process that frees what it held before the next builds its arm.

    The processes start, and import, at once.
    """
    workers = [Worker(row.name) for row in rows]
    results = []
    for row, worker in zip(rows, workers, strict=True):
        tried = [measure_size(case, row, size, worker, repeats, row_seconds) for size in row.arms]
        worker.close()
        ran = [result for result in tried if result.samples_per_second is not None]
        results.append(max(ran, key=lambda r: r.samples_per_second or 0.0) if ran else tried[-1])
    first = next((r for r in results if r.samples_per_second is not None), None)
    for result in results:
        if first is not None and result.samples_per_second is not None:
            usual = statistics.median(first.seconds)
            result.ratio = usual / statistics.median(result.seconds)
            result.ratio_range = (usual / max(result.seconds), usual / min(result.seconds))
    return results


def measure_size(case: Case, row: Row, size: int, worker: Worker, repeats: int, row_seconds: float) -> Result:
    """A step that warms up, and `repeats` that count; fewer where time runs out, but always one."""
    started = time.perf_counter()
    building, steps = 0.0, list[float]()
    try:
        worker.build(row.arms[size])
        building = time.perf_counter() - started
        while len(steps) < 2 or (
            len(steps) < 1 + repeats and time.perf_counter() - started + steps[-1] < row_seconds
        ):
            steps.append(worker.step())
        result = result_of(case, row, size, steps[1:], worker.peak_memory())
    except Failed as failed:
        result = Result(name=row.name.strip(), micro_batch=size, seconds=steps, failure=failed.reason)
    said = result.failure or f"{result.samples_per_second:.2f} samples/s"
    parts = f"importing and building {building:.1f} s, steps {', '.join(f'{s:.2f}' for s in steps)} s"
    print(f"{result.name}, micro-batch {size}: {said} ({parts})", flush=True)
    return result


def result_of(case: Case, row: Row, size: int, seconds: list[float], peak_memory: int) -> Result:
    """All but what compares it with others."""
    taken = statistics.median(seconds)
    work = case.batch_size * sample_work(case)
    result = Result(
        name=row.name.strip(),
        micro_batch=size,
        seconds=seconds,
        samples_per_second=case.batch_size / taken,
        peak_memory=peak_memory,
        tflops=work.total / taken / 1e12,
    )
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peaks = peak_tflops(name, "fp8" if row.in_fp8 else case.dtype), peak_tflops(name, case.dtype)
        if peaks[0] is not None and peaks[1] is not None:
            result.mfu = least_seconds(work, peaks[0], peaks[1]) / taken
    return result


def sample_work(case: Case) -> Work:
    """What the method computes for one sample, whoever runs it: nothing that is computed twice."""
    sizes = read_sizes(case.transformer)
    tokens = Tokens(image_tokens(sizes, case.latent_shape[1:]), case.text_length)
    assert case.stage.shift is not None
    forwards = case.stage.forwards()
    return step_work(forward_work(sizes, tokens), forwards.answers, forwards.points)


def count_unit(case: Case) -> int:
    """Floating-point operations of one forward of one sample."""
    worker = Worker("one forward")
    worker.build((OneForward, (case,)))
    flops = worker.flops()
    worker.close()
    return flops
