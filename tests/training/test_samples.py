"""Sample grids: what they show, and what rank 0 holds for them."""

import gc
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from multirank import run_ranks
from tiny_runs import ROOT, make_shards, tiny_recipe
from torch import Tensor

from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import Recipe
from soar_mega.data.prompts import encode_prompts
from soar_mega.distributed import start_world
from soar_mega.evaluation.generate import schedule_of
from soar_mega.models.family import read_sizes
from soar_mega.training import loop, samples
from soar_mega.training.run import Trainer
from soar_mega.training.samples import grid

PROMPTS = ["a red 3", "a blue 7", "two 4"]
FROZEN = ("AutoencoderKL", "CLIPTextModelWithProjection", "T5EncoderModel")


def living() -> list[Any]:
    """The pipeline's frozen models in this process; a rank that has none need not import their classes."""
    return [thing for thing in gc.get_objects() if type(thing).__name__ in FROZEN]


def draw(recipe: Recipe) -> tuple[list[str], list[str], Tensor | None]:
    """In which order a run starts, which halves of a VAE there are afterwards, and the first grid."""
    events: list[str] = []
    encode_prompts, make_engine = samples.encode_prompts, loop.make_engine

    def encode_noted(*arguments: Any) -> Any:
        events.append("prompts")
        return encode_prompts(*arguments)

    def make_noted(*arguments: Any) -> Any:
        events.append(f"engine beside {len(living())}")
        return make_engine(*arguments)

    samples.encode_prompts, loop.make_engine = encode_noted, make_noted
    start_world(recipe.parallel)
    trainer = Trainer(recipe, RunFolder(recipe.checkpoint.save))
    halves = [name for each in living() for name in ("encoder", "decoder") if getattr(each, name, None)]
    image = trainer.measurements._grid.draw(trainer.engine)  # type: ignore[union-attr]
    trainer.close()
    return events, halves, image


@pytest.mark.parametrize("base", ["base", "flux_base"])
@pytest.mark.parametrize("shift", [None, 3.0])  # None: the scheduler's, which is dynamic
def test_a_run_samples_as_its_pipeline_does(base: str, shift: float | None, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes/tiny" / base / "transformer", tmp_path / "transformer")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(tmp_path / "scheduler")
    recipe = tiny_recipe(
        tmp_path, tmp_path, model__pipeline_dir=tmp_path, stage__shift="null" if shift is None else shift
    )
    steps: Any = SimpleNamespace(recipe=recipe, _stages={})
    stage: Any = loop.Steps._stage_of(steps, (4, 8, 16), read_sizes(tmp_path))
    assert stage.schedule == schedule_of(tmp_path, shift)(32)


def test_a_grid_shows_the_prompts_and_no_encoder_stays(tmp_path: Path) -> None:
    """Under ZeRO 3 each forward waits for the other replica; encoders are gone before the engine comes."""
    recipe = tiny_recipe(
        make_shards(tmp_path / "shards", 4, seed=1),
        tmp_path / "run",
        train__global_batch_size=4,
        train__micro_batch_size=1,
        parallel__engine="deepspeed",
        parallel__zero_stage=3,
        logging__sample_interval=1,
        logging__sample_prompts=f"[{', '.join(PROMPTS)}]",
        logging__sample_steps=2,
    )
    (*first, image), second = run_ranks(draw, 2, recipe)
    assert first == [["prompts", "engine beside 0"], ["decoder"]]
    assert second == (["engine beside 0"], [], None)
    from soar_mega.evaluation.generate import Generator  # imports what the second rank does without

    base = ROOT / "recipes/tiny/base"
    images = Generator.load(base).images(
        encode_prompts(base, PROMPTS), steps=2, guidance_scale=recipe.logging.sample_guidance_scale
    )
    enlarged = images.repeat_interleave(6, dim=-2).repeat_interleave(6, dim=-1)
    torch.testing.assert_close(image, grid(enlarged), atol=1e-4, rtol=0)
