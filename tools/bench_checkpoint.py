"""Measures for how long training stands still for a checkpoint, written synchronously and in the background.

    python tools/bench_checkpoint.py
    torchrun --nproc-per-node 2 tools/bench_checkpoint.py --folder /scratch/bench

A model of random weights with optimizer and EMA takes real steps on made-up batches, and is saved every few of them.
The first save of each mode is left out. Writes JSON.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from arguments import positive, result_file
from origin import device_slug, origin

from soar_mega import platform
from soar_mega.checkpoints.checkpoint import Progress, Saved, Saver
from soar_mega.checkpoints.manifest import MANIFEST
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
)
from soar_mega.data.batch import Batch
from soar_mega.distributed import data_rank, data_size, is_rank_zero, start_world, stop_world
from soar_mega.engines import make_engine
from soar_mega.engines.engine import Engine
from soar_mega.faults.agreement import on_rank_zero
from soar_mega.flow import normal
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.family import presets, read_sizes
from soar_mega.stages import SftConfig, make_stage

SHAPE, TEXT, TEXT_DIM, POOLED = (4, 16, 16), 8, 32, 32
BATCH = 4  # samples per data-parallel rank

Json = dict[str, Any]


def sizes(layers: int, heads: int) -> Sizes:
    """A transformer of the given depth and width."""
    return read_sizes(
        presets()["sd35_medium"].to_diffusers()
        | {
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": 64,
            "in_channels": 4,
            "out_channels": 4,
            "sample_size": 16,
            "joint_attention_dim": TEXT_DIM,
            "pooled_projection_dim": POOLED,
            "caption_projection_dim": 64 * heads,
            "pos_embed_max_size": 16,
            "dual_attention_layers": [],
        }
    )


def batch_of(step: int) -> Batch:
    """This rank's share of made-up samples."""
    position = torch.arange(BATCH) + BATCH * (step * data_size() + data_rank())

    def draw(stream: str, *shape: int) -> torch.Tensor:
        return normal(1, stream, position, 0, shape)

    return Batch(
        seed=1,
        position=position,
        valid=torch.ones(BATCH, dtype=torch.bool),
        latent_shape=SHAPE,
        text_length=TEXT,
        latents=draw("latents", *SHAPE),
        text=draw("text", TEXT, TEXT_DIM),
        pooled=draw("pooled", POOLED),
        empty_text=torch.zeros(TEXT, TEXT_DIM),
        empty_pooled=torch.zeros(POOLED),
    )


def take_step(engine: Engine, stage: Any, step: int) -> None:
    batch = batch_of(step)
    answers = engine.answer(stage.queries, batch)
    engine.learn(stage.points, stage.loss, batch, answers)
    engine.step(1e-4)


def measure(engine: Engine, stage: Any, folder: Path, async_save: bool, saves: int, steps: int) -> Json:
    """Blocked seconds of each save but the first, and the pace of the steps with and without a save under way."""
    run = RunFolder(folder / ("async" if async_save else "sync"))
    on_rank_zero(lambda: run.path.mkdir(parents=True))
    saved: list[Saved] = []
    saver = Saver(run, CheckpointConfig(async_save=async_save, keep_last=1), {}, saved.append)
    pace: dict[bool, list[float]] = {False: [], True: []}
    for save in range(1, saves + 1):
        saver.save(engine, Progress(iteration=save))
        for step in range(steps):
            writing = len(saved) < save
            started = time.perf_counter()
            take_step(engine, stage, save * steps + step)
            pace[writing].append(time.perf_counter() - started)
            saver.poll()
    saver.finish()
    files = json.loads((run.checkpoint(saves) / MANIFEST).read_text())["files"]
    counted = saved[1:]
    return {
        "megabytes": sum(int(facts["size"]) for facts in files.values()) / 1e6,
        "blocked_seconds": [one.blocked_seconds for one in counted],
        "written_seconds": [one.seconds for one in counted],
        "median_blocked_seconds": statistics.median(one.blocked_seconds for one in counted),
        "step_seconds": statistics.median(pace[False]) if pace[False] else None,
        "step_seconds_while_writing": statistics.median(pace[True]) if pace[True] else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=positive, default=6)
    parser.add_argument("--heads", type=positive, default=4, help="of 64 channels each")
    parser.add_argument("--saves", type=int, default=6, help="per mode; the first is not counted")
    parser.add_argument("--steps", type=positive, default=8, help="between two saves")
    parser.add_argument(
        "--folder", help="where checkpoints are written and removed again (a temporary folder)"
    )
    parser.add_argument("--out", help="JSON file (benchmarks/results/<date>-<device>-checkpoint.json)")
    arguments = parser.parse_args()
    if arguments.saves < 2:
        parser.error("--saves must be 2 or more: the first is not counted")

    platform.install()
    recipe = Recipe(
        model=ModelConfig(init="random", dtype="fp32"),
        stage=SftConfig(),
        train=TrainConfig(micro_batch_size=BATCH, ema_decay=0.99),
        optimizer=OptimizerConfig(),
        parallel=ParallelConfig(),
    )
    start_world(recipe.parallel)
    path = result_file(arguments.out, f"{device_slug()}-checkpoint") if is_rank_zero() else None
    recipe.train.global_batch_size = BATCH * data_size()
    engine = make_engine(recipe, sizes(arguments.layers, arguments.heads))
    engine.keep_weights("ema")
    stage = make_stage(recipe.stage, shift=1.0)
    take_step(engine, stage, 0)
    gc.freeze()  # as a run does
    folder = Path(on_rank_zero(lambda: arguments.folder or tempfile.mkdtemp(prefix="bench-checkpoint-")))
    modes = {
        name: measure(engine, stage, folder, name == "async", arguments.saves, arguments.steps)
        for name in ("sync", "async")
    }
    if path is not None:
        report(modes, path)
        for name in modes:
            shutil.rmtree(folder / name)
        if not arguments.folder:
            folder.rmdir()
    stop_world()


def report(modes: dict[str, Json], path: Path) -> None:
    """Prints what was measured, and writes it."""
    for name, found in modes.items():
        print(
            f"{name:5}  {found['megabytes']:.0f} MB  blocked {found['median_blocked_seconds']:.3f} s (median of "
            f"{len(found['blocked_seconds'])}), written in {statistics.median(found['written_seconds']):.2f} s"
        )
    ratio = modes["async"]["median_blocked_seconds"] / modes["sync"]["median_blocked_seconds"]
    print(f"asynchronous / synchronous: {ratio:.3f}")
    content = {
        **origin("bench_checkpoint"),
        "processes": data_size(),
        "load_average": os.getloadavg()[0],  # what else the machine does makes both modes slower
        "ratio": ratio,
        "modes": modes,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
