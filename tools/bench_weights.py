"""Measures what it takes to compute with kept weights (an EMA, a reference) for a moment: to swap them in and out.

    torchrun --nproc-per-node 2 tools/bench_weights.py
    python tools/bench_weights.py --smoke

Two ways in turn: the library's, where each rank writes its parts into the parameter buffer, which is gathered once, in
the model's type; and one parameter after another, where a copy of the current one is kept and the parts are added up
over the ranks, in float32. The first repetition is left out. Writes JSON.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arguments import positive, result_file
from bench_checkpoint import sizes
from origin import device_slug, origin

from soar_mega import platform
from soar_mega.config import ModelConfig, OptimizerConfig, ParallelConfig, Recipe, TrainConfig
from soar_mega.distributed import data_size, device, is_rank_zero, start_world, stop_world
from soar_mega.engines import make_engine
from soar_mega.engines.engine import Engine
from soar_mega.stages import SftConfig

NAME = "reference"

Json = dict[str, Any]
Way = Callable[[Engine], AbstractContextManager[None]]


@contextmanager
def parameter_by_parameter(engine: Engine) -> Iterator[None]:
    """The baseline."""
    kept, main = engine.weights[NAME].pieces, engine._main
    trained = {name: p for name, p in engine.parameters.items() if p.requires_grad}
    saved = {name: p.detach().clone() for name, p in trained.items()}
    with torch.no_grad():
        for name, parameter in trained.items():
            whole = torch.zeros(parameter.shape, dtype=torch.float32, device=device())
            if name in kept:
                main.pieces[name].of(whole).copy_(kept[name])
            dist.all_reduce(whole)
            parameter.copy_(whole)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in saved.items():
                trained[name].copy_(tensor)


WAYS: dict[str, Way] = {
    "parameter_by_parameter": parameter_by_parameter,
    "parts": lambda engine: engine.using(NAME),
}


def seconds(way: Way, engine: Engine) -> float:
    """Of one swap in and out, from when all ranks are ready until all are done."""
    dist.barrier()
    started = time.perf_counter()
    with way(engine):
        pass
    torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - started


def measure(dtype: str, layers: int, heads: int, repetitions: int) -> Json:
    """Both ways on a model of one type, in turn."""
    recipe = Recipe(
        model=ModelConfig(init="random", dtype=dtype),
        stage=SftConfig(),
        train=TrainConfig(),
        optimizer=OptimizerConfig(),
        parallel=ParallelConfig(),
    )
    engine = make_engine(recipe, sizes(layers, heads))
    engine.keep_weights(NAME)
    engine.load_weights({"model": {name: torch.zeros_like(p) for name, p in engine.parameters.items()}})
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for repetition in range(repetitions + 1):
        for name, way in WAYS.items():
            taken = seconds(way, engine)
            if repetition:
                found[name].append(taken)
    medians = {name: statistics.median(times) for name, times in found.items()}
    return {
        "parameters": sum(p.numel() for p in engine.parameters.values()),
        "seconds": found,
        "median_seconds": medians,
        "ratio": medians["parameter_by_parameter"] / medians["parts"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=positive, default=12)
    parser.add_argument("--heads", type=positive, default=6, help="of 64 channels each")
    parser.add_argument("--repetitions", type=positive, default=15)
    parser.add_argument("--smoke", action="store_true", help="a model that takes no time, twice")
    parser.add_argument("--out", help="JSON file (benchmarks/results/<date>-<device>-weights.json)")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.layers, arguments.heads, arguments.repetitions = 2, 1, 2

    platform.install()
    start_world(ParallelConfig())
    path = result_file(arguments.out, f"{device_slug()}-weights") if is_rank_zero() else None
    found = {
        dtype: measure(dtype, arguments.layers, arguments.heads, arguments.repetitions)
        for dtype in ("fp32", "bf16")
    }
    if path is not None:
        report(found, path)
    stop_world()


def report(found: dict[str, Json], path: Path) -> None:
    """Prints what was measured, and writes it."""
    for dtype, one in found.items():
        old, new = (1e3 * one["median_seconds"][name] for name in WAYS)
        print(
            f"{dtype}  {one['parameters'] / 1e6:.1f} M parameters  one by one {old:.1f} ms, by parts {new:.1f} ms  "
            f"(medians of {len(one['seconds']['parts'])})  ratio {one['ratio']:.2f}"
        )
    content = {
        **origin("bench_weights"),
        "processes": data_size(),
        "load_average": os.getloadavg()[0],  # what else the machine does makes both ways slower
        "types": found,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
