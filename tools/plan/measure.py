"""Times a few steps of a layout on the processes of torchrun; `validate` starts it, with tools/ on PYTHONPATH.

python -m torch.distributed.run --nproc-per-node 4 -m plan.measure OUT LAYOUT
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from plan.gloo import SHAPE, SIZES, STEPS, TEXT, recipe_of
from soar_mega import platform
from soar_mega.data.batch import Batch
from soar_mega.distributed import data_rank, data_size, start_world, stop_world
from soar_mega.engines import make_engine
from soar_mega.stages import make_stage


def made_up(samples: int) -> Batch:
    """This rank's share of a batch of noise."""
    share = samples // data_size()
    return Batch(
        seed=0,
        position=torch.arange(share) + share * data_rank(),
        valid=torch.ones(share, dtype=torch.bool),
        latent_shape=SHAPE,
        text_length=TEXT,
        latents=torch.randn(share, *SHAPE),
        text=torch.randn(share, TEXT, SIZES.joint_attention_dim),
        pooled=torch.randn(share, SIZES.pooled_projection_dim),
        empty_text=torch.zeros(TEXT, SIZES.joint_attention_dim),
        empty_pooled=torch.zeros(SIZES.pooled_projection_dim),
    )


def main(out: Path, layout: str) -> None:
    """Rank 0 writes the median of the steps after the first."""
    torch.set_num_threads(1)
    platform.install()
    recipe = recipe_of(layout)
    start_world(recipe.parallel)
    engine, stage = make_engine(recipe, SIZES), make_stage(recipe.stage, shift=1.0)
    seconds = []
    for _ in range(1 + STEPS):
        batch = made_up(recipe.train.global_batch_size)
        dist.barrier()
        start = time.perf_counter()
        engine.learn(stage.points, stage.loss, batch, engine.answer(stage.queries, batch))
        engine.step(1e-4)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        out.write_text(
            json.dumps({"layout": layout, "seconds": statistics.median(seconds[1:]), "steps": seconds[1:]})
        )
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
