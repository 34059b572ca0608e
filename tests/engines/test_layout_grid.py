"""Every layout of up to four processes trains as one process does, and goes on from every other's checkpoint.

A layout saves once; then each loads all checkpoints in turn, so that all ordered pairs are seen.
"""

import functools
from itertools import product
from pathlib import Path

import pytest
import torch
from engine_cases import (
    EIGHT_LAYERS,
    assert_training_agrees,
    iterate,
    make_batch,
    make_recipe,
    start_engine,
    train_case,
)
from multirank import run_ranks

from soar_mega.checkpoints.rank_file import save_tensors
from soar_mega.checkpoints.reading import read_tensors
from soar_mega.config import Recipe
from soar_mega.models.common.conditions import Conditions
from soar_mega.stages import make_stage

pytestmark = pytest.mark.slow


def grid_recipe(layout=(1, 1), **settings) -> Recipe:
    """Micro-batches that an interleaved pipeline must fill up; layers for two chunks on each of four ranks."""
    return make_recipe(layout, train={"micro_batch_size": 3, "points_per_micro_batch": 9}, **settings)


def megatron_layouts() -> dict[str, tuple[int, Recipe]]:
    """By name: the number of processes, and the recipe."""
    found = {}
    sizes = product((1, 2), (1, 2, 4), (1, 2), (1, 2), (1, 2), (False, True))
    for tensor, pipeline, chunks, context, data, sequence_parallel in sizes:
        processes = tensor * pipeline * context * data
        if processes > 4 or (chunks > 1 and pipeline == 1) or (sequence_parallel and tensor == 1):
            continue
        names = (("tp", tensor), ("pp", pipeline), ("vpp", chunks), ("cp", context), ("dp", data))
        name = "-".join([f"{key}{n}" for key, n in names if n > 1] + ["sp"] * sequence_parallel) or "one"
        found[name] = (
            processes,
            grid_recipe(
                (tensor, pipeline),
                sequence_parallel=sequence_parallel,
                virtual_pipeline_model_parallel_size=chunks,
                context_parallel_size=context,
            ),
        )
    return found


def zero_layouts() -> dict[str, tuple[int, Recipe]]:
    return {
        f"zero{stage}-tp{tensor}-dp{data}": (
            tensor * data,
            grid_recipe((tensor, 1), engine="deepspeed", zero_stage=stage),
        )
        for stage, tensor, data in ((0, 1, 2), (1, 2, 2), (2, 1, 2), (3, 2, 2))
    }


MEGATRON = megatron_layouts()
EVERY = MEGATRON | zero_layouts()


def test_the_grid_is_whole():
    assert len(MEGATRON) == 22 and {"one", "pp4-vpp2", "tp2-pp2-vpp2-sp", "pp2-vpp2-cp2"} < set(MEGATRON)


@functools.cache
def one_process():
    [result] = run_ranks(train_case, 1, grid_recipe(), 3, EIGHT_LAYERS)
    return result


@pytest.mark.parametrize("layout", [name for name in MEGATRON if name != "one"])
def test_training_is_that_of_one_process(layout):
    processes, recipe = MEGATRON[layout]
    for found in run_ranks(train_case, processes, recipe, 3, EIGHT_LAYERS):
        assert_training_agrees(found, one_process())


def go_on(engine, recipe):
    """Losses and gradient norms of two more steps, and a velocity by the EMA after them."""
    stage = make_stage(recipe.stage, shift=1.0)
    numbers = []
    for i in (1, 2):
        statistics, result = iterate(engine, stage, make_batch(i))
        numbers += [statistics["loss"], result.grad_norm]
    drawn = torch.Generator().manual_seed(0)
    latents, text, pooled = (torch.randn(2, *shape, generator=drawn) for shape in ((4, 8, 8), (6, 12), (10,)))
    return numbers, engine.velocity(latents, torch.full((2,), 0.5), Conditions(text, pooled), weights="ema")


def save_and_go_on(recipe, folder):
    engine = start_engine(recipe, EIGHT_LAYERS)
    engine.keep_weights("ema")
    iterate(engine, make_stage(recipe.stage, shift=1.0), make_batch(0))
    save_tensors(engine.sharded_state_dict(), folder)
    return go_on(engine, recipe)


def load_each_and_go_on(recipe, folders):
    engine = start_engine(recipe, EIGHT_LAYERS)
    engine.keep_weights("ema")
    found = {}
    for name, folder in folders.items():
        engine.load_state_dict(read_tensors(Path(folder), engine.sharded_state_dict(is_loading=True)))
        found[name] = go_on(engine, recipe)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[dict[str, str], tuple]:
    """The folder of each layout's checkpoint, and how one process goes on after its own."""
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in EVERY}
    ways = {
        name: run_ranks(save_and_go_on, processes, recipe, folders[name])
        for name, (processes, recipe) in EVERY.items()
    }
    expected = ways["one"][0]
    for name, ranks in ways.items():
        for found in ranks:
            assert_goes_on(found, expected, f"{name} after saving")
    return folders, expected


def assert_goes_on(found, expected, name):
    (numbers, velocity), (wanted, wanted_velocity) = found, expected
    assert numbers == pytest.approx(wanted, rel=1e-5), name
    torch.testing.assert_close(velocity, wanted_velocity, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("layout", EVERY)
def test_every_layout_goes_on_from_every_checkpoint(layout, saved):
    folders, expected = saved
    processes, recipe = EVERY[layout]
    for found in run_ranks(load_each_and_go_on, processes, recipe, folders, timeout=900):
        assert list(found) == list(EVERY)
        for name, one in found.items():
            assert_goes_on(one, expected, f"{layout} from the checkpoint of {name}")
