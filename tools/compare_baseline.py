"""Compares training with soar_mega against the published SOAR procedure, on this machine, in one run.

    python tools/compare_baseline.py                      the tiny pipeline
    python tools/compare_baseline.py --model wide         75 M random parameters, 64 image tokens
    python tools/compare_baseline.py --model sd35_medium --dtype bf16 --recompute --batch-size 16     on a GPU
    python tools/compare_baseline.py ... --rows "published procedure" "8 points" --micro-batches 4

The baseline is a reimplementation of the published procedure on diffusers' transformer
(tools/baseline/published.py) with the same dtype and precomputed embeddings as ours and torch's attention, at
the fastest of --micro-batches. Each habit of it that costs something is a row of its own.

Every arm lives in its own process. On the CPU all live at once and take turns, so that a ratio is always one
of neighbours in time. On a GPU, which holds one of them only, each is built, measured and ended before the
next; an arm that cannot run is a row that says why.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from arguments import number, positive, result_file
from baseline.case import Case, make_case, models
from baseline.measuring import Result, fastest, measure_alone, measure_in_turns
from baseline.rows import Row, rows_alone, rows_in_turns
from kernel_traffic import both_forms
from kernel_traffic import table as traffic_table
from origin import device_slug, origin

from soar_mega.layer_checks import ATTENTION_BACKENDS
from soar_mega.rules import above, at_least
from soar_mega.stages import SoarConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS = ("local", "transformer_engine", "fp8")


def main() -> int:
    args = parse_arguments()
    stage = SoarConfig(
        num_auxiliary_points=args.points,
        sampling_steps=args.sampling_steps,
        timesteps="grid",
        shift=args.shift,
    )
    path = result_file(args.out, f"{device_slug()}-compare-{args.model}")
    case = make_case(
        args.model,
        stage=stage,
        batch_size=args.batch_size,
        dtype=args.dtype,
        recompute=args.recompute,
    )
    sizes = args.micro_batches or [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= case.batch_size]
    if torch.cuda.is_available():
        every = rows_alone(case, sizes, args.points_per_forward, args.layers, args.attention_backends)
        results = measure_alone(case, named(every, args.rows), args.repeats, args.row_seconds)
    else:
        # names are the same at any size: a wrong one is told before sizes are tried
        named(rows_in_turns(case, sizes, lambda row: row.at(min(row.arms))), args.rows)
        results = measure_in_turns(case, named(rows_in_turns(case, sizes, fastest), args.rows), args.repeats)
    print_table(case, results)
    content = report(case, results)
    traffic = both_forms(
        stage, case.latent_shape, case.batch_size, DTYPES[case.dtype], results[-1].micro_batch
    )
    print(traffic_table(traffic))
    content["traffic"] = {form: asdict(counted) for form, counted in traffic.items()}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nWritten to {path}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", choices=models(), help="what is trained (default: tiny)")
    parser.add_argument("--batch-size", type=positive, default=32, help="samples per step (default: 32)")
    parser.add_argument(
        "--points",
        type=number(int, at_least(0)),
        default=6,
        help="N, auxiliary points per sample (default: 6, as published)",
    )
    parser.add_argument(
        "--sampling-steps", type=positive, default=40, help="K of the rollout (default: 40, as published)"
    )
    parser.add_argument(
        "--shift",
        type=number(float, above(0)),
        default=3.0,
        help="shift of the schedule (default: 3, as SD3.5)",
    )
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="activation recomputation; on a GPU in the published rows alone",
    )
    parser.add_argument(
        "--repeats", type=positive, default=7, help="rounds in which every arm makes one step (default: 7)"
    )
    parser.add_argument(
        "--micro-batches",
        type=positive,
        nargs="+",
        help="sizes to try, in samples; ours takes all points of them in one forward (default: powers of two)",
    )
    parser.add_argument("--rows", nargs="+", help="only rows whose name contains one of these (default: all)")
    on_gpu = parser.add_argument_group("on a GPU")
    on_gpu.add_argument(
        "--points-per-forward", type=positive, nargs="+", default=[8, 16], help="rows of ours (default: 8 16)"
    )
    on_gpu.add_argument(
        "--layers", nargs="+", choices=LAYERS, default=LAYERS, help="rows of ours (default: all)"
    )
    on_gpu.add_argument(
        "--attention-backends",
        nargs="+",
        choices=ATTENTION_BACKENDS,
        default=["sdpa"],
        help="model.attention_backend in rows of ours (default: sdpa)",
    )
    on_gpu.add_argument(
        "--row-seconds",
        type=number(float, at_least(0)),
        default=25.0,
        help="an arm makes no further step after this time, when it has made two (default: 25)",
    )
    parser.add_argument("--out", help="where to write the JSON (default: benchmarks/results/<date>-...)")
    return parser.parse_args()


def named(rows: Sequence[Row], names: Sequence[str] | None) -> list[Row]:
    """Those whose name contains one of `names`.

    Raises:
        ValueError: one of them is in no row's name.
    """
    if names is None:
        return list(rows)
    unknown = [name for name in names if not any(name in row.name for row in rows)]
    if unknown:
        every = ", ".join(row.name.strip() for row in rows)
        raise ValueError(f"--rows names no row of: {every} (unknown: {', '.join(unknown)})")
    return [row for row in rows if any(name in row.name for name in names)]


def print_table(case: Case, results: list[Result]) -> None:
    print(
        f"\n{case.name} model, {case.dtype}, {case.batch_size} samples per step, "
        f"{case.stage.forwards().points} points per sample, {device_slug()}, {torch.get_num_threads()} threads"
    )
    print(
        f"{'':46} {'micro-':>7} {'samples':>8} {'ratio':>6} {'spread':>13} {'peak':>9} {'TFLOP':>7} {'MFU':>5} "
        f"{'forward':>8}"
    )
    print(
        f"{'':46} {'batch':>7} {'per s':>8} {'':>6} {'(min..max)':>13} {'MiB':>9} {'per s':>7} {'':>5} {'units':>8}"
    )
    for r in results:
        if r.failure is not None:
            print(f"{r.name:46} {r.micro_batch:7d} {r.failure}")
            continue
        assert r.ratio_range is not None and r.peak_memory is not None
        spread = f"{r.ratio_range[0]:.2f}..{r.ratio_range[1]:.2f}"
        mfu = "" if r.mfu is None else f"{r.mfu:.0%}"
        units = "" if r.forward_units is None else f"{r.forward_units:.1f}"
        print(
            f"{r.name:46} {r.micro_batch:7d} {r.samples_per_second:8.2f} {r.ratio:6.2f} {spread:>13} "
            f"{r.peak_memory / 2**20:9.1f} {r.tflops:7.2f} {mfu:>5} {units:>8}"
        )
    print(
        "ratio: samples per second against the first row, median over rounds\n"
        "peak: all that training holds at once (weights, gradients, optimizer, activations)\n"
        "TFLOP per s: of the method's work, without what is computed twice; MFU: its share of the GPU's peak\n"
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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"compare_baseline.py: {error}")
