"""Compares training with soar_mega against the published SOAR procedure, on this machine, in one run.

    python tools/compare_baseline.py                      the tiny pipeline
    python tools/compare_baseline.py --model wide         75 M random parameters, 64 image tokens
    python tools/compare_baseline.py --model sd35_medium --dtype bf16 --recompute     on a GPU

The baseline is a reimplementation of the published procedure on diffusers' transformer
(tools/baseline/published.py) with the same dtype, attention, recomputation and precomputed embeddings as
ours, at the micro-batch size that is fastest for it. Each habit of it that costs something is a row of its
own. Every arm lives in its own process; the arms take turns, so that a ratio is always one of neighbours in
time.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from baseline.case import Case, make_case
from baseline.worker import Arm, Worker
from kernel_traffic import both_forms
from kernel_traffic import table as traffic_table
from origin import origin

from soar_mega.config import StageConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPAIRED = {"rollout_graph": False, "hold_graphs": False, "separate_points": False}


@dataclass(frozen=True)
class Row:
    """One line of the table: how to build the arm, and its micro-batch."""

    name: str
    build: Callable[..., Arm]
    arguments: tuple[Any, ...]
    micro_batch: int


@dataclass(kw_only=True)
class Result:
    """What was measured of one row. Ratios are of samples per second, to the first row, taken round by
    round.
    """

    name: str
    micro_batch: int
    seconds: list[float]
    samples_per_second: float
    ratio: float
    ratio_range: tuple[float, float]
    peak_memory: int
    forward_units: float


def main() -> int:
    args = parse_arguments()
    case = make_case(
        args.model,
        stage=StageConfig(
            num_auxiliary_points=args.points,
            sampling_steps=args.sampling_steps,
            timesteps="grid",
            shift=args.shift,
        ),
        batch_size=args.batch_size,
        dtype=args.dtype,
        recompute=args.recompute,
    )
    rows = choose_rows(case, args.micro_batches)
    results = measure(case, rows, args.repeats)
    print_table(case, results)
    traffic = both_forms(
        case.stage, case.latent_shape, case.batch_size, DTYPES[case.dtype], results[-1].micro_batch
    )
    print(traffic_table(traffic))
    path = Path(args.out or f"benchmarks/results/{date.today()}-{device_name()}-compare-{case.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    traffic_report = {form: asdict(counted) for form, counted in traffic.items()}
    path.write_text(json.dumps(report(case, results) | {"traffic": traffic_report}, indent=1) + "\n")
    print(f"\nWritten to {path}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="tiny", help="tiny | wide | sd35_medium | sd35_large (default: tiny)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="samples per step (default: 32)")
    parser.add_argument(
        "--points", type=int, default=6, help="N, auxiliary points per sample (default: 6, as published)"
    )
    parser.add_argument(
        "--sampling-steps", type=int, default=40, help="K of the rollout (default: 40, as published)"
    )
    parser.add_argument(
        "--shift", type=float, default=3.0, help="shift of the schedule (default: 3, as SD3.5)"
    )
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--recompute", action="store_true", help="activation recomputation, in all arms")
    parser.add_argument(
        "--repeats", type=int, default=7, help="rounds in which every arm makes one step (default: 7)"
    )
    parser.add_argument(
        "--micro-batches",
        type=int,
        nargs="+",
        help="sizes to try, in samples; ours takes all points of them in one forward (default: powers of two)",
    )
    parser.add_argument("--out", help="where to write the JSON (default: benchmarks/results/<date>-...)")
    return parser.parse_args()


def choose_rows(case: Case, sizes: list[int] | None) -> list[Row]:
    """All rows at their micro-batch: the one that is fastest for the published procedure, for its repair,
    and for ours.

    The single habits are measured at the published procedure's own size, where nothing else changes.
    """
    from baseline.our_arm import OurArm
    from baseline.published_arm import PublishedArm, procedure_of

    sizes = sizes or [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= case.batch_size]

    def published(name: str, micro: int, online: bool = False, **habits: bool) -> Row:
        return Row(name, PublishedArm, (case, procedure_of(case, **habits), micro, online), micro)

    def ours(name: str, points: int) -> Row:
        # of a guided forward, which has two rows for each
        samples = min(max(1, points // 2), case.batch_size)
        return Row(name, OurArm, (case, samples, points), points)

    best = fastest([published("published procedure", size) for size in sizes])
    micro = best.micro_batch
    rows = [
        best,
        published("  rollout without a graph", micro, rollout_graph=False),
        published("  one backward per point, no held graphs", micro, hold_graphs=False),
        published("  auxiliary points in one forward", micro, separate_points=False),
        fastest([published("  all three repaired", size, **REPAIRED) for size in sizes]),
    ]
    if case.pipeline:
        rows.insert(1, published("  with online encoders", micro, online=True))
    rows.append(ours("soar_mega, forwards as large as the first row's", micro))
    return [
        *rows,
        fastest([ours("soar_mega", size * (case.stage.num_auxiliary_points + 1)) for size in sizes]),
    ]


def fastest(rows: list[Row]) -> Row:
    """The row with the shortest second step."""
    if len(rows) == 1:
        return rows[0]
    times = []
    for row in rows:
        worker = Worker(row.name, row.build, *row.arguments)
        worker.step()
        times.append(min(worker.step(), worker.step()))
        worker.close()
        print(f"{row.name.strip()}, micro-batch {row.micro_batch}: {times[-1]:.2f} s per step", flush=True)
    return rows[times.index(min(times))]


def measure(case: Case, rows: list[Row], repeats: int) -> list[Result]:
    """Warms every arm up with two steps, then lets them take turns."""
    unit = count_unit(case)
    workers = [Worker(row.name, row.build, *row.arguments) for row in rows]
    for worker in workers:
        worker.step()
        worker.step()
    seconds: list[list[float]] = [[] for _ in rows]
    for turn in range(repeats):
        for taken, worker in zip(seconds, workers, strict=True):
            taken.append(worker.step())
        print(f"round {turn + 1}/{repeats} done", flush=True)
    results = []
    for row, taken, worker in zip(rows, seconds, workers, strict=True):
        ratios = [first / mine for first, mine in zip(seconds[0], taken, strict=True)]
        results.append(
            Result(
                name=row.name.strip(),
                micro_batch=row.micro_batch,
                seconds=taken,
                samples_per_second=case.batch_size / statistics.median(taken),
                ratio=statistics.median(ratios),
                ratio_range=(min(ratios), max(ratios)),
                peak_memory=worker.peak_memory(),
                forward_units=worker.flops() / unit / case.batch_size,
            )
        )
        worker.close()
    return results


def count_unit(case: Case) -> int:
    """Floating-point operations of one forward of one sample."""
    from baseline.published_arm import OneForward

    worker = Worker("one forward", OneForward, case)
    flops = worker.flops()
    worker.close()
    return flops


def print_table(case: Case, results: list[Result]) -> None:
    print(
        f"\n{case.name} model, {case.dtype}, {case.batch_size} samples per step, "
        f"N = {case.stage.num_auxiliary_points}, {device_name()}, {torch.get_num_threads()} threads"
    )
    print(f"{'':46} {'micro-':>7} {'samples':>8} {'ratio':>6} {'spread':>13} {'peak':>9} {'forward':>8}")
    print(f"{'':46} {'batch':>7} {'per s':>8} {'':>6} {'(min..max)':>13} {'MiB':>9} {'units':>8}")
    for r in results:
        spread = f"{r.ratio_range[0]:.2f}..{r.ratio_range[1]:.2f}"
        print(
            f"{r.name:46} {r.micro_batch:7d} {r.samples_per_second:8.2f} {r.ratio:6.2f} {spread:>13} "
            f"{r.peak_memory / 2**20:9.1f} {r.forward_units:8.1f}"
        )
    print(
        "ratio: samples per second against the first row, median over rounds\n"
        "peak: all that training holds at once (weights, gradients, optimizer, activations)\n"
        "forward units: counted work per sample, in forwards of one sample\n"
        "micro-batch: samples of a forward; for soar_mega points"
    )


def report(case: Case, results: list[Result]) -> dict[str, Any]:
    return {
        **origin("compare_baseline"),
        "threads": torch.get_num_threads(),
        "model": case.name,
        "transformer": case.transformer,
        "stage": asdict(case.stage),
        "batch_size": case.batch_size,
        "dtype": case.dtype,
        "recompute": case.recompute,
        "rows": [asdict(result) for result in results],
    }


def device_name() -> str:
    return "gpu" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
