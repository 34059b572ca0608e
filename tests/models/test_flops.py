"""Counted work is what torch counts, on random small models: forward, backward and what is computed again."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from soar_mega.config import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig, Recipe, StageConfig
from soar_mega.data.batch import Batch
from soar_mega.layer_checks import RECOMPUTE_MODULES
from soar_mega.models.common.build import build_model
from soar_mega.models.common.flops import (
    Tokens,
    Work,
    forward_work,
    image_tokens,
    recomputed_work,
    step_work,
)
from soar_mega.models.common.lora import add_adapters
from soar_mega.models.common.rank_parameters import trained_shares
from soar_mega.models.sd3.presets import PRESETS
from soar_mega.models.sd3.sizes import SD3Sizes
from soar_mega.models.sd3.work import layer_work
from soar_mega.stages import SftConfig, SftMultiConfig, SoarConfig, make_stage


def random_sizes(draw: random.Random) -> SD3Sizes:
    heads, head_dim, layers = draw.choice([1, 2, 3]), draw.choice([8, 16]), draw.randint(1, 4)
    return SD3Sizes(
        sample_size=8,
        patch_size=draw.choice([1, 2]),
        in_channels=draw.choice([3, 16]),
        out_channels=draw.choice([4, 16]),
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        joint_attention_dim=draw.choice([24, 40]),
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=draw.choice([16, 56]),
        pos_embed_max_size=16,
        dual_attention_layers=tuple(sorted(draw.sample(range(layers), draw.randint(0, layers)))),
        qk_norm=draw.choice([None, "rms_norm"]),
    )


def inputs_of(sizes: SD3Sizes, batch: int, latent_size: tuple[int, int], text: int) -> list[torch.Tensor]:
    shapes = [
        (batch, sizes.in_channels, *latent_size),
        (batch,),
        (batch, text, sizes.joint_attention_dim),
        (batch, sizes.pooled_projection_dim),
    ]
    return [torch.empty(shape, device="meta") for shape in shapes]


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Plain products: the backward of a fused attention would make its scores again; no forward is cut short."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        set_checkpoint_early_stop(False),
        FlopCounterMode(display=False) as counter,
    ):
        yield counter


@pytest.mark.parametrize("seed", range(6))
def test_work_is_what_torch_counts(seed: int) -> None:
    draw = random.Random(seed)
    sizes, batch = random_sizes(draw), draw.randint(1, 3)
    latent_size, text = (draw.choice([4, 6, 8]), draw.choice([4, 6, 8])), draw.randint(1, 9)
    tokens = Tokens(image_tokens(sizes, latent_size), text)
    forward = forward_work(sizes, tokens)
    every_result = {"recompute_granularity": "selective", "recompute_modules": list(RECOMPUTE_MODULES)}
    for settings in (
        {},
        {"recompute_granularity": "full"},
        {"recompute_granularity": "full", "recompute_every": 2},
        {"recompute_granularity": "selective"},
        every_result,
    ):
        model = ModelConfig(dtype="fp32", **settings)
        mmdit = build_model(sizes, model, ParallelConfig(), meta=True)
        with counting() as counter:
            velocity = mmdit(*inputs_of(sizes, batch, latent_size, text))
        assert counter.get_total_flops() == batch * forward.total
        with counting() as counter:
            velocity.sum().backward()
        again = recomputed_work(sizes, tokens, model)
        assert counter.get_total_flops() == batch * (forward.backward + again).total
        assert (again.total > 0) == bool(settings)


FROZEN_STREAM, FROZEN_MLPS = ["*.text.*"], ["layers.[0-3].*.mlp.*"]


@pytest.mark.parametrize(
    "changes, text, at_most",  # of a step in which everything is trained
    [
        ({"lora": LoraConfig(rank=1)}, 9, 0.75),
        ({"optimizer": OptimizerConfig(frozen=FROZEN_STREAM)}, 40, 0.9),
        ({"optimizer": OptimizerConfig(frozen=FROZEN_MLPS)}, 40, 0.9),
    ],
    ids=["adapters", "text frozen", "mlps frozen"],
)
def test_no_gradients_are_computed_of_weights_that_are_not_trained(
    changes: dict[str, Any], text: int, at_most: float
) -> None:
    sizes = replace(
        random_sizes(random.Random(3)),
        num_layers=8,
        num_attention_heads=12,
        attention_head_dim=64,
        caption_projection_dim=768,
        dual_attention_layers=(0,),
    )
    recipe = Recipe(stage=SoarConfig(), **changes)
    mmdit = build_model(sizes, ModelConfig(dtype="fp32"), ParallelConfig(), meta=True)
    if recipe.lora.rank:
        mmdit.requires_grad_(False)
        add_adapters([mmdit], recipe.lora, seed=0)
    for name, parameter in mmdit.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in recipe.optimizer.frozen):
            parameter.requires_grad_(False)
    latent_size = (16, 16)
    with counting() as counter:
        mmdit(*inputs_of(sizes, 1, latent_size, text)).sum().backward()
    forward = forward_work(sizes, Tokens(image_tokens(sizes, latent_size), text))
    found = step_work(forward, 0, 1, trained_shares(sizes, recipe))
    assert found.total == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert found.total < at_most * step_work(forward, 0, 1).total


def test_each_kind_is_what_its_modules_do() -> None:
    """Torch counts by module too."""
    sizes = random_sizes(random.Random(3))
    mmdit = build_model(sizes, ModelConfig(dtype="fp32"), ParallelConfig(), meta=True)
    with counting() as counter, torch.no_grad():
        mmdit(*inputs_of(sizes, 1, (8, 8), 5))
    counts = {name: sum(by.values()) for name, by in counter.get_flop_counts().items()}
    linears = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")

    def of(stream: str, *modules: str) -> int:
        return sum(count for name, count in counts.items() if stream in name and name.endswith(modules))

    assert forward_work(sizes, Tokens(image_tokens(sizes, (8, 8)), 5)) == Work(
        image=of(".image.", *linears),
        text=of(".text.", *linears),
        attention=of("", ".core_attention"),
        conditioning=of("", ".modulation", ".norm_out", ".linear_2"),
        embedding=of("", ".pos_embed", ".context_embedder", ".linear_1"),
        output=of("", ".proj_out"),
    )


@pytest.mark.parametrize("preset, tera", [("sd35_medium", 2.138), ("sd35_large", 6.860)])
def test_published_models_at_512_pixels(preset: str, tera: float) -> None:
    sizes = PRESETS[preset]
    assert round(forward_work(sizes, Tokens(image_tokens(sizes, (64, 64)), 154)).total / 1e12, 3) == tera


@pytest.mark.parametrize(
    "settings, forwards",
    [
        (SoarConfig(num_auxiliary_points=6), (2, 7)),
        (SoarConfig(num_auxiliary_points=6, guidance_scale=1.0), (1, 7)),
        (SoarConfig(num_auxiliary_points=2, num_rollout_paths=3), (2, 7)),
        (SoarConfig(num_auxiliary_points=1, rollout_steps=3), (6, 2)),
        (SoarConfig(num_auxiliary_points=0), (0, 1)),
        (SftConfig(), (0, 1)),
        (SftMultiConfig(num_auxiliary_points=6), (0, 7)),
    ],
)
def test_forwards_of_a_sample(settings: StageConfig, forwards: tuple[int, int]) -> None:
    """What the settings say is what the stage asks for and makes."""
    stage = make_stage(settings, 3.0)
    sample = torch.zeros(1, dtype=torch.int64)
    one = Batch(seed=0, position=sample, valid=sample == 0, latent_shape=(1, 1, 1), text_length=1)
    queries = stage.queries(one)
    answers = 0 if queries is None else (1 + len(queries.then)) * (2 if queries.unconditional else 1)
    made = stage.points(one)
    assert settings.forwards()[:2] == (answers, len(made) * made.branches) == forwards
    branches = settings.forwards().query_branches, settings.forwards().point_branches
    assert branches == (2 if queries is not None and queries.unconditional else 1, made.branches)


def test_a_sample_of_soar_is_23_forwards() -> None:
    """But for the gradients of inputs, which nobody needs: less than half a hundredth of it."""
    sizes = PRESETS["sd35_medium"]
    forward = forward_work(sizes, Tokens(1024, 154))
    assert 22.98 < step_work(forward, 2, 7).total / forward.total <= 23


def test_works_add_up() -> None:
    work = layer_work(PRESETS["sd35_medium"], 0, Tokens(16, 4))
    assert (2 * work + work).total == 3 * work.total == (work + Work()).total * 3
    assert work.token_linears == work.image + work.text > 0
