"""A small model, in-memory batches and training cases for the engine's tests, importable by other processes."""

import zlib
from dataclasses import fields, replace

import pytest
import torch

from soar_mega.config import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
)
from soar_mega.data.batch import Batch
from soar_mega.distributed import data_rank, data_size, start_world
from soar_mega.engines import make_engine
from soar_mega.flow import normal
from soar_mega.layer_checks import RECOMPUTE_MODULES
from soar_mega.models.common.gather import full_shape, local_shard
from soar_mega.models.common.names import global_parameter_names
from soar_mega.models.sd3.sizes import SD3Sizes
from soar_mega.stages import SoarConfig, make_stage

SHAPE, TEXT, TEXT_DIM, POOLED = (4, 8, 8), 6, 12, 10
SIZES = SD3Sizes(
    num_layers=4,
    num_attention_heads=4,
    attention_head_dim=4,
    in_channels=4,
    out_channels=4,
    patch_size=2,
    sample_size=8,
    joint_attention_dim=TEXT_DIM,
    pooled_projection_dim=POOLED,
    caption_projection_dim=16,
    pos_embed_max_size=8,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
EIGHT_LAYERS = replace(SIZES, num_layers=8, dual_attention_layers=(0, 3))
EMA_DECAY = 0.75
# with an odd number of micro-batches, which an interleaved pipeline must fill up
VPP2 = {
    "virtual_pipeline_model_parallel_size": 2,
    "train": {"micro_batch_size": 3, "points_per_micro_batch": 9},
}
# every source is read: two paths (eps), fresh endpoints (z1_aux), guidance, dropped conditions, uneven weights
SOAR = SoarConfig(
    num_auxiliary_points=2,
    num_rollout_paths=2,
    fresh_endpoint=True,
    guidance_scale=3.0,
    sampling_steps=5,
    condition_dropout=0.3,
    auxiliary_weight=0.7,
    loss_weighting="cosmap",
    shift=3.0,
)


def settings_of_soar(settings):
    """The settings of another stage, where it has them with the values of SOAR above."""
    shared = {field.name: getattr(SOAR, field.name) for field in fields(settings) if field.name != "name"}
    return settings(**shared)


PARTS_AGAIN = {"recompute_granularity": "selective", "recompute_modules": list(RECOMPUTE_MODULES)}


def make_recipe(
    layout=(1, 1),
    sequence_parallel=False,
    stage=SOAR,
    train=None,
    optimizer=None,
    model=None,
    lora=None,
    **parallel,
) -> Recipe:
    settings = {"seed": 5, "global_batch_size": 8, "micro_batch_size": 2, "points_per_micro_batch": 3}
    return Recipe(
        model=ModelConfig(**{"init": "random", "dtype": "fp32", **(model or {})}),
        stage=stage,
        train=TrainConfig(**(settings | (train or {}))),
        lora=LoraConfig(**(lora or {})),
        optimizer=OptimizerConfig(**({"lr": 1e-3, "clip_grad": 0.5} | (optimizer or {}))),
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout[0],
            pipeline_model_parallel_size=layout[1],
            sequence_parallel=sequence_parallel,
            **parallel,
        ),
    )


def make_batch(iteration: int, size: int = 8, invalid: int | None = 3) -> Batch:
    """This rank's share of a global batch of `size`; the sample at place `invalid` could not be read."""
    share = size // data_size()
    place = torch.arange(share) + share * data_rank()
    position = place + size * iteration

    def draw(stream: str, *shape: int):
        return normal(11, stream, position, 0, shape)

    latents = draw("latents", *SHAPE)
    valid = torch.ones(share, dtype=torch.bool)
    if invalid is not None:
        valid = place != invalid
        latents[~valid] = torch.nan
    empty = normal(11, "empty", torch.zeros(1, dtype=torch.int64), 0, (TEXT + 1, TEXT_DIM))[0]
    return Batch(
        seed=5,
        position=position,
        valid=valid,
        latent_shape=SHAPE,
        text_length=TEXT,
        latents=latents,
        text=draw("text", TEXT, TEXT_DIM),
        pooled=draw("pooled", POOLED),
        empty_text=empty[:TEXT],
        empty_pooled=empty[TEXT, :POOLED],
    )


def start_engine(recipe: Recipe, sizes: SD3Sizes = SIZES):
    """An engine with random weights that no layer of the model ignores."""
    start_world(recipe.parallel)
    engine = make_engine(recipe, sizes)
    shapes = global_parameter_names(engine.layout)
    engine.load_weights({"model": {name: random_tensor(name, p) for name, p in shapes.items()}})
    return engine


def random_tensor(name: str, parameter: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    full = torch.randn(full_shape(parameter), generator=generator) * 0.2
    return local_shard(full + 1.0 if "layernorm" in name else full, parameter)


def iterate(engine, stage, batch, lr=1e-3):
    answers = engine.answer(stage.queries, batch, weights=stage.answer_weights)
    statistics = engine.learn(stage.points, stage.loss, batch, answers)
    return statistics, step(engine, lr)


def step(engine, lr=1e-3):
    """A step of the engine, and of an EMA where one is kept."""
    result = engine.step(lr)
    if result.ok and "ema" in engine.weights:
        engine.blend_weights("ema", EMA_DECAY)
    return result


def train_case(recipe: Recipe, iterations: int = 5, sizes: SD3Sizes = SIZES) -> dict:
    """Losses and gradient norms of some iterations, and the gradients of the first one."""
    engine = start_engine(recipe, sizes)
    stage = make_stage(recipe.stage, shift=1.0)
    found: dict = {"statistics": [], "norms": [], "gradients": {}}
    for iteration in range(iterations):
        batch = make_batch(iteration, recipe.train.global_batch_size)
        answers = engine.answer(stage.queries, batch)
        found["statistics"].append(engine.learn(stage.points, stage.loss, batch, answers))
        if iteration == 0:
            found["gradients"] = engine.gradients()
        result = engine.step(recipe.optimizer.lr)
        assert result.ok
        found["norms"].append(result.grad_norm)
    return found


def assert_training_agrees(found, expected, tolerance=1e-5):
    """Two results of `train_case`, of which the first may have fewer iterations."""
    iterations = len(found["norms"])
    assert iterations and found["norms"] == pytest.approx(expected["norms"][:iterations], rel=tolerance)
    for ours, theirs in zip(found["statistics"], expected["statistics"][:iterations], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    assert_gradients_agree(found["gradients"], expected["gradients"], tolerance)


def assert_gradients_agree(found, expected, tolerance=1e-5):
    """Relative to each gradient's largest entry, and at least 1e-3 of the model's largest (some are truly zero)."""
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / torch.maximum(gradient.abs().max(), floor)
        assert error < tolerance, f"{name}: relative error {error:.1e}"
