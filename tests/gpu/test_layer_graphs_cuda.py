"""Layers as CUDA graphs train as they do without: the bookkeeping is tested on CPUs, here are the graphs themselves."""

import gc
from dataclasses import replace

import pytest
import torch
from engine_cases import (
    EIGHT_LAYERS,
    PARTS_AGAIN,
    SIZES,
    assert_gradients_agree,
    make_batch,
    make_recipe,
    start_engine,
)
from step_profile.memory import held_by_graphs
from te_cases import skip_what_is_not_installed

from soar_mega.models.common.micro_batches import LIGHT, LIGHT_IN_FP8
from soar_mega.models.flux.sizes import FluxSizes
from soar_mega.stages import make_stage

# as wide as an SD3.5 head: attention by the kernels that a real model gets
HEADS_OF_64 = replace(SIZES, num_attention_heads=2, attention_head_dim=64, caption_projection_dim=128)
FLUX = FluxSizes(
    in_channels=4,
    num_double_layers=2,
    num_single_layers=2,
    num_attention_heads=1,
    attention_head_dim=128,
    joint_attention_dim=12,
    pooled_projection_dim=10,
)
FLASH = {"dtype": "bf16", "attention_backend": "flash"}
TE = {"dtype": "bf16", "transformer_impl": "transformer_engine"}
FP8 = TE | {"fp8": "hybrid"}
LIGHTLY = {"recompute_granularity": "selective", "recompute_modules": list(LIGHT)}
LIGHTLY_IN_FP8 = LIGHTLY | {"recompute_modules": list(LIGHT_IN_FP8)}
CASES = {
    "fp32": {},
    "bf16": {"model": {"dtype": "bf16"}},
    "heads of 64": {"model": {"dtype": "bf16"}},
    "heads of 64 recomputed": {"model": {"dtype": "bf16", "recompute_granularity": "full"}},
    "recomputed": {"model": {"dtype": "bf16", "recompute_granularity": "full", "recompute_every": 2}},
    "selective": {"model": {"dtype": "bf16", "recompute_granularity": "selective"}},
    "parts again": {"model": {"dtype": "bf16", **PARTS_AGAIN}},
    "heads of 64, parts again": {"model": {"dtype": "bf16", **LIGHTLY}},
    "heads of 64 over Transformer Engine, parts again": {"model": TE | LIGHTLY},
    "heads of 64 in FP8, parts again": {"model": FP8 | LIGHTLY_IN_FP8},
    "flux, parts again": {"model": FLASH | LIGHTLY},
    "plain": {"model": {"fused_kernels": False}},
    "frozen": {"optimizer": {"frozen": ["context_embedder.*", "time_text_embed.*", "layers.1.*"]}},
    "heads of 64 by flash-attn": {"model": FLASH},
    "heads of 64 by flash-attn recomputed": {"model": FLASH | {"recompute_granularity": "selective"}},
    "heads of 64 in FP8": {"model": FP8},
    "heads of 64 in FP8 by flash-attn": {"model": FP8 | FLASH},
    "heads of 64 in FP8 recomputed": {"model": FP8 | {"recompute_granularity": "full"}},
    "flux": {"model": {"dtype": "bf16"}},
    "flux by flash-attn": {"model": FLASH},
    "flux in FP8": {"model": FP8},
    "adapters": {"model": {"dtype": "bf16"}, "lora": {"rank": 4}},
    "overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}


def trained(recipe, sizes) -> tuple[list[torch.Tensor], list[float], dict[str, torch.Tensor]]:
    """Loss of each point and gradient norm of three steps, and the first gradients."""
    engine, stage = start_engine(recipe, sizes), make_stage(recipe.stage, shift=1.0)
    losses, norms, gradients = [], [], {}
    for iteration in range(3):
        batch = make_batch(iteration)
        engine.learn(stage.points, stage.loss, batch, engine.answer(stage.queries, batch))
        losses.append(engine.learned[1].cpu())
        gradients = gradients or engine.gradients()
        norms.append(engine.step(1e-3).grad_norm)
    return losses, norms, gradients


@pytest.mark.parametrize("name", CASES)
def test_graphs_change_nothing(name):
    kind = name.split()[0]
    sizes = {"heads": HEADS_OF_64, "overlap": EIGHT_LAYERS, "flux": FLUX}.get(kind, SIZES)
    train = {"seed": 5, "global_batch_size": 8, "micro_batch_size": 2, "points_per_micro_batch": 3}
    case = CASES[name]
    recipe = make_recipe(train=train | {"cuda_graphs": "layers"}, **case)
    skip_what_is_not_installed(recipe.model, FLUX.attention_head_dim if kind == "flux" else 64)
    in_fp8 = recipe.model.fp8 is not None
    if in_fp8 and recipe.model.recompute_granularity == "full":
        # without graphs, the gradients of recomputed layers are rounded to bf16 before they are added up
        case = case | {"model": case["model"] | {"recompute_granularity": "none"}}
    found = trained(recipe, sizes)
    expected = trained(make_recipe(train=train | {"cuda_graphs": "none"}, **case), sizes)
    assert_alike(found, expected, in_fp8)


def assert_alike(found, expected, in_fp8):
    assert torch.equal(found[0][0], expected[0][0])  # to the bit, before a sum of gradients in another order
    # what differs in a last bit is rounded to another number of FP8 in the next step
    later = 1e-2 if in_fp8 else 1e-4
    assert_gradients_agree(found[2], expected[2], 1e-2 if in_fp8 else 1e-5)
    for ours, theirs in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=later, atol=0)
    assert found[1] == pytest.approx(expected[1], rel=later)


def forget_graphs():
    """Those of an engine before, which is garbage in a cycle."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("graphs", ["none", "layers"])
@pytest.mark.parametrize(
    ("model", "again"),
    [({"dtype": "bf16"}, LIGHTLY), (FLASH, LIGHTLY), (TE, LIGHTLY), (FP8, LIGHTLY_IN_FP8)],
    ids=["local", "flash-attn", "Transformer Engine", "FP8"],
)
def test_parts_made_again_change_nothing_and_keep_less(model, again, graphs):
    found = []
    # many points: what recordings hold is counted in pieces of 2 MiB
    train = {"global_batch_size": 8, "points_per_micro_batch": 40, "cuda_graphs": graphs}
    for settings in (model, model | again):
        recipe = make_recipe(train=train, model=settings)
        skip_what_is_not_installed(recipe.model, 64)
        forget_graphs()
        before = held_by_graphs()
        found.append((trained(recipe, HEADS_OF_64), held_by_graphs() - before))
    (kept, held), (made_again, held_again) = found
    assert_alike(made_again, kept, recipe.model.fp8 is not None)
    assert held_again < held or graphs == "none"


def test_what_recordings_hold_is_taken_of_the_gpu():
    """Activations lie where the allocator has nothing given out: what it has taken is what a run needs."""
    recipe = make_recipe(train={"global_batch_size": 8, "cuda_graphs": "layers"}, model={"dtype": "bf16"})
    forget_graphs()
    before = held_by_graphs()
    engine, stage = start_engine(recipe, HEADS_OF_64), make_stage(recipe.stage, shift=1.0)
    batch = make_batch(0)
    engine.learn(stage.points, stage.loss, batch, engine.answer(stage.queries, batch))
    held = held_by_graphs()
    assert held > before
    assert torch.cuda.memory_reserved() >= torch.cuda.memory_allocated() + held
