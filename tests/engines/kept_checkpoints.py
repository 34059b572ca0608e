"""A checkpoint of a small model that holds numbers anyone can compute, written by different versions of megatron-core.

Keep one of the megatron-core at hand in tests/engines/data:
    PYTHONPATH=. python tests/engines/kept_checkpoints.py
"""

import shutil
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron.core
import torch
from engine_cases import SIZES, iterate, make_batch, make_recipe, start_engine

from soar_mega import distributed, platform
from soar_mega.checkpoints.checkpoint import Progress, Saver
from soar_mega.checkpoints.resume import resume
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import CheckpointConfig
from soar_mega.engines.adam_steps import kept_steps
from soar_mega.stages import SftConfig, make_stage

DATA = Path(__file__).parent / "data"
SMALL = replace(SIZES, num_layers=1, dual_attention_layers=(), pos_embed_max_size=4)
RECIPE = make_recipe(stage=SftConfig())
STEPS = 7
PROGRESS = Progress(iteration=3, consumed_samples=24, loader={"consumed": 24})


def engine_with_ema() -> Any:
    engine = start_engine(RECIPE, SMALL)
    engine.keep_weights("ema")
    return engine


def numbers(key: str, like: torch.Tensor) -> torch.Tensor:
    """What a tensor of the checkpoint holds: small positive numbers, different for each name."""
    return ((torch.arange(like.numel()) + zlib.crc32(key.encode())) % 97 + 1.0).view(like.shape) / 128


def write(folder: Path) -> None:
    engine = engine_with_ema()
    iterate(engine, make_stage(RECIPE.stage, shift=1.0), make_batch(0))
    [optimizer] = engine.optimizer.chained_optimizers
    for group in optimizer.optimizer.param_groups:
        group["step"] = STEPS
    for piece in engine.sharded_state_dict()["pieces"]:
        piece.flat.copy_(numbers(piece.key, piece.flat))
    folder.mkdir()
    config = CheckpointConfig(async_save=False)
    Saver(RunFolder(folder), config, SMALL.to_diffusers()).save(engine, PROGRESS)


def read(folder: Path) -> tuple[Progress, int, dict[str, torch.Tensor]]:
    """Progress, Adam's steps, and all tensors by their names in the checkpoint, as an engine holds them."""
    engine = engine_with_ema()
    progress = resume(RunFolder(folder), CheckpointConfig(), engine, SMALL.to_diffusers())
    [optimizer] = engine.optimizer.chained_optimizers
    [group] = kept_steps(optimizer.optimizer)["optimizer"]["param_groups"]
    pieces = {piece.key: piece.flat.clone() for piece in engine.sharded_state_dict()["pieces"]}
    model = {f"optimizer.state.param.{name}": p.detach().view(-1) for name, p in engine.parameters.items()}
    assert all(model[key].equal(pieces[key]) for key in model)
    return progress, group["step"], pieces


if __name__ == "__main__":
    platform.install()
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary) / "run")
        name = f"megatron-core-{megatron.core.__version__}"
        shutil.make_archive(str(DATA / name), "xztar", Path(temporary) / "run")
    distributed.stop_world()
