"""Where FP8 begins and ends, when weights are cast and what cannot run, over a stand-in for Transformer Engine."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import te_stand_in
import torch
from peer import make_inputs

from soar_mega.config import ModelConfig, ParallelConfig, Recipe
from soar_mega.distributed import start_world
from soar_mega.models.common.build import build_model
from soar_mega.models.common.memory import Workload, rank_memory
from soar_mega.models.common.precision import cast_weights
from soar_mega.models.common.te_layers import VARIABLES, CastOnce
from soar_mega.models.family import presets
from soar_mega.models.sd3.sizes import SD3Sizes
from soar_mega.stages import SoarConfig

SIZES = SD3Sizes(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4, num_attention_heads=4,
    attention_head_dim=8, joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=10,
    pos_embed_max_size=6, dual_attention_layers=(0,), qk_norm="rms_norm",
)  # fmt: skip
FP8 = {"transformer_impl": "transformer_engine", "fp8": "hybrid", "init": "random"}


@pytest.fixture
def record(monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    return te_stand_in.install(monkeypatch)


def build(**settings):
    start_world(ParallelConfig())
    model = build_model(SIZES, ModelConfig(**(FP8 | settings)), ParallelConfig())
    return model, make_inputs(SIZES, (8, 6), 3, 7)


def linears(model, layer=None):
    modules = model.modules() if layer is None else model.layers[str(layer)].modules()
    return [module for module in modules if isinstance(module, CastOnce)]


def answer(model, inputs):
    with torch.no_grad():
        model(*inputs)


def learn(model, inputs):
    model(*inputs).sum().backward()


def test_only_linears_on_tokens_are_cast(record):
    model, inputs = build()
    learn(model, inputs)
    names = {name for name, module in model.named_modules() if isinstance(module, CastOnce)}
    assert len(names) == len(record.casts) == 31
    assert {name.rpartition(".")[2] for name in names} == {
        "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2",
    }  # fmt: skip
    others = [m for m in model.modules() if hasattr(m, "weight") and not isinstance(m, CastOnce)]
    assert len(others) > 20 and all(m.weight.dtype == torch.bfloat16 for m in others)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_weights_are_cast_once_until_they_change(recompute, record):
    model, inputs = build(recompute_granularity=recompute)
    for _ in range(2):
        answer(model, inputs)
        learn(model, inputs)
        learn(model, inputs)
        assert len(record.casts) == len(linears(model)) == len(set(map(id, record.casts)))
        assert all(record.forwards)
        record.casts.clear()
        model.weights_changed()


def test_layers_are_recomputed_in_their_context(record):
    model, inputs = build(
        recompute_granularity="full", first_last_layers_bf16=True, num_layers_at_end_in_bf16=2
    )
    learn(model, inputs)
    assert record.contexts == [0, 1, 2, 3, 3, 2, 1, 0] and record.recomputed == 0
    assert set(map(id, record.casts)) == set(map(id, linears(model, 1)))
    assert sum(record.forwards) == 2 * len(linears(model, 1))


def test_weights_can_be_cast_before_a_forward(record):
    model, inputs = build(first_last_layers_bf16=True)
    for _ in range(2):
        for number, layer in model.layers.items():
            cast_weights(layer.modules(), int(number), model.config)
        assert len(record.casts) == len(linears(model, 1) + linears(model, 2))
    answer(model, inputs)
    assert len(record.casts) == len(linears(model, 1) + linears(model, 2))


def fp8_bytes(sizes, parallel=None, rank=0, **settings):
    """What the memory model adds to the weights of a rank for FP8."""
    recipe = Recipe(
        model=ModelConfig(**(FP8 | settings)), parallel=parallel or ParallelConfig(), stage=SoarConfig()
    )
    bf16 = replace(recipe, model=replace(recipe.model, fp8=None, first_last_layers_bf16=False))
    work = Workload((8, 6), 7, points=1, rows=1, samples=1, micro_batches=2)
    in_fp8, without = (rank_memory(sizes, each, work, 1, rank).weights for each in (recipe, bf16))
    return in_fp8 - without


@pytest.mark.parametrize(
    "settings", [{}, {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 2}], ids=["all", "one"]
)
def test_the_memory_model_counts_two_forms_of_what_is_cast(settings, record):
    model, inputs = build(**settings)
    learn(model, inputs)
    cast = 2 * sum(linear.weight.numel() for linear in record.casts)
    assert fp8_bytes(SIZES, **settings) == cast > 0
    pipeline = ParallelConfig(pipeline_model_parallel_size=2)
    assert sum(fp8_bytes(SIZES, pipeline, rank, **settings) for rank in (0, 1)) == cast
    assert fp8_bytes(SIZES, ParallelConfig(tensor_model_parallel_size=2), **settings) == cast / 2


def test_the_forms_are_what_fp8_took_more_on_an_h100():
    """Outside of CUDA graphs, whose recordings hold the activations."""
    results = Path(__file__).parents[2] / "benchmarks/results"
    name = "2026-11-27-h100-80gb-hbm3-{}.json"
    in_fp8, in_bf16 = (
        json.loads((results / name.format(f"profile{kind}-flash-attn-3")).read_text())["ranks"][0]["memory"]
        for kind in ("-fp8", "")
    )
    compared = json.loads((results / name.format("compare-sd35_medium-no-recompute")).read_text())["rows"]
    peaks = {row["name"]: row["peak_allocated_without_graphs"] for row in compared}
    row = "8 points, CUDA graphs"
    more = [
        in_fp8["most"] - in_bf16["most"],
        peaks[f"soar_mega, FP8, {row}"] - peaks[f"soar_mega, {row}"],
    ]
    assert more == pytest.approx([fp8_bytes(presets()["sd35_medium"])] * 2, rel=0.05)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_answers_leave_no_trace_in_histories(recompute, record):
    """Of delayed scaling. What a weight was cast from stays: it is cast no second time in this step."""
    model, inputs = build(fp8_recipe="delayed", recompute_granularity=recompute)
    answer(model, inputs)
    assert record.contexts == [-1] and record.recomputed == 0
    assert all(amax[0] == 0 and amax[1] > 0 for amax in record.amaxes)
    learn(model, inputs)
    assert record.contexts == [-1, -1] and record.recomputed == (4 if recompute == "full" else 0)
    assert all(amax[0] > 0 and amax[1] > 0 for amax in record.amaxes)


@pytest.mark.parametrize(("backend", "chosen"), [("auto", "111"), ("fused", "010"), ("unfused", "001")])
def test_attention_of_transformer_engine_is_chosen_by_name(backend, chosen, record):
    build_model(SIZES, ModelConfig(**FP8, attention_backend=backend), ParallelConfig(), meta=True)
    assert "".join(os.environ[VARIABLES[name]] for name in ("flash", "fused", "unfused")) == chosen


def test_a_model_without_memory_needs_no_transformer_engine_layers(record):
    model = build_model(SIZES, ModelConfig(**FP8), ParallelConfig(), meta=True)
    assert not linears(model) and all(p.is_meta for p in model.parameters())


IMPOSSIBLE = [
    ({"fp8": "e5m2"}, {}, "choose one of null, e4m3, hybrid"),
    ({"fp8_recipe": "current"}, {}, "choose one of tensorwise, delayed, blockwise, mxfp8"),
    ({"transformer_impl": "te"}, {}, "choose one of local, transformer_engine"),
    ({"transformer_impl": "local"}, {}, "fp8=hybrid is done by Transformer Engine"),
    ({"dtype": "fp32"}, {}, "set model.dtype=bf16"),
    ({"fp8_recipe": "delayed", "first_last_layers_bf16": True}, {}, "one history for all layers"),
    ({"fp8": None, "first_last_layers_bf16": True}, {}, "exception from FP8: set model.fp8"),
    ({"fp8": None, "transformer_impl": "local", "attention_backend": "fused"}, {}, "is Transformer Engine's"),
    ({"fp8": None, "dtype": "fp32", "attention_backend": "flash"}, {}, "16 bits only"),
    ({"attention_backend": "flash"}, {}, "flash-attn, which is not installed"),
    ({"fp8_recipe": "mxfp8"}, {}, r"10\.0 or more.* has 9\.0.*=tensorwise or delayed or blockwise"),
    ({}, {"tensor_model_parallel_size": 4}, "multiple of 16 features.* leaves 8"),
    ({"fp8_recipe": "blockwise"}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "blocks of 128"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "parallel", "message"), IMPOSSIBLE)
def test_impossible_settings(model, parallel, message, record):
    with pytest.raises(ValueError, match=message):
        build_model(SIZES, ModelConfig(**FP8 | model), ParallelConfig(**parallel), meta=True)


@pytest.mark.parametrize(
    ("capability", "model", "message"),
    [
        (None, {}, "transformer_engine needs a GPU"),
        (
            None,
            {"transformer_impl": "local", "fp8": None, "attention_backend": "flash"},
            "=flash needs a GPU",
        ),
        ((8, 0), {}, r"capability 8\.9 or more, and this one has 8\.0: leave model.fp8 out$"),
        ((8, 9), {"fp8_recipe": "blockwise"}, r"capability 9\.0 or more"),
        ((7, 5), {"fp8": None, "attention_backend": "flash"}, r"capability 8\.0 or more"),
    ],
)
def test_what_a_machine_cannot_run(capability, model, message, monkeypatch):
    te_stand_in.install(monkeypatch, capability)
    with pytest.raises(ValueError, match=message):
        build_model(SIZES, ModelConfig(**FP8 | model), ParallelConfig(), meta=True)
