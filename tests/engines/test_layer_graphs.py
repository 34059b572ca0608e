"""Layers as graphs: the bookkeeping of recordings, on a CPU (tests/gpu has the graphs themselves)."""

import weakref
from functools import partial

import pytest
import torch
from collecting_cases import Collecting, collected_batch, collecting_recipe, learn_once, with_kept_weights
from engine_cases import (
    EIGHT_LAYERS,
    PARTS_AGAIN,
    SIZES,
    VPP2,
    iterate,
    make_batch,
    make_recipe,
    start_engine,
)
from multirank import run_ranks
from repeated_work import RepeatedWork

from soar_mega.config import LoraConfig, ModelConfig
from soar_mega.engines.megatron import why_no_graphs
from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.layer_graphs import RecordedLayer, garbage_waits
from soar_mega.models.common.open_sum import tensors_of
from soar_mega.models.flux.sizes import FluxSizes
from soar_mega.stages import make_stage

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
RECOMPUTED = {"recompute_granularity": "full", "recompute_every": 2}
FROZEN = {"frozen": ["context_embedder.*", "time_text_embed.*", "layers.1.*"]}
LAYOUTS = {
    "one": ((1, 1), 1, {"model": RECOMPUTED, "optimizer": FROZEN}),
    "dp2": ((1, 1), 2, OVERLAP),
    "tp2": ((2, 1), 2, {"model": PARTS_AGAIN}),
    "tp2-sp-dp2": ((2, 1), 4, {"sequence_parallel": True, **OVERLAP}),
    "pp2-vpp2": ((1, 2), 2, {**VPP2, "model": {"dtype": "bf16"}}),
    "pp4": ((1, 4), 4, {}),
    "cp2": ((1, 1), 2, {"context_parallel_size": 2}),
    "flux": ((1, 2), 2, {**VPP2, "model": RECOMPUTED}),
    "flux-tp2-sp": ((2, 1), 2, {"sequence_parallel": True, "model": PARTS_AGAIN}),
}
# a double and a single layer in one chunk
FLUX = FluxSizes(
    in_channels=4,
    num_double_layers=3,
    num_single_layers=3,
    num_attention_heads=2,
    attention_head_dim=8,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    axes_dims_rope=(2, 4, 2),
)
SLOW = ("tp2-sp-dp2", "pp4", "cp2", "flux-tp2-sp")


LORA = LoraConfig(rank=2, dropout=0.3, targets=["*.attn.*", "*norm1.linear"])


def trained(recipe, sizes, recorder=None):
    """Three steps, and the weights after them; `recorder`: makes one for the engine, None: nothing is recorded."""
    engine, stage = start_engine(recipe, sizes), make_stage(recipe.stage, shift=1.0)
    if recorder is not None:
        engine.record_layers(partial(recorder, engine))
    found = [iterate(engine, stage, make_batch(iteration)) for iteration in range(3)]
    return found, {name: p.detach().clone() for name, p in engine.parameters.items()}


def with_and_without(recipe, sizes) -> None:
    steps, weights = trained(recipe, sizes)
    recorded_steps, recorded_weights = trained(recipe, sizes, RepeatedWork)
    assert recorded_steps == steps
    assert recorded_weights.keys() == weights.keys()
    assert all(torch.equal(recorded_weights[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS]
)
def test_recorded_layers_train_as_others_do(name):
    layout, processes, settings = LAYOUTS[name]
    sizes = FLUX if "flux" in name else EIGHT_LAYERS if "vpp" in name else SIZES
    run_ranks(with_and_without, processes, make_recipe(layout, **settings), sizes)


def test_recorded_layers_measure_and_learn_both_branches():
    """Forwards alone and those with a backward have recordings of their own, and say the same to the last bit."""
    found = []
    for is_recorded in (False, True):
        engine, stage, batch = with_kept_weights(collecting_recipe()), Collecting(), collected_batch()
        if is_recorded:
            engine.record_layers(partial(RepeatedWork, engine))
        for _ in range(2):
            measured = engine.measure(stage.points, stage.log_probability, batch)
            statistics = dict(learn_once(engine, stage, batch))
        found.append((measured, statistics, engine.gradients()))
    (measured, statistics, gradients), (again, recorded, found_gradients) = found
    assert torch.equal(measured, again) and statistics == recorded
    assert all(torch.equal(found_gradients[name], gradient) for name, gradient in gradients.items())


def test_recorded_adapters_train_as_others_do():
    """What a step leaves out, and whether there are adapters, is read where it lies at each replay."""
    recipe = make_recipe()
    recipe.lora = LORA
    steps, weights = trained(recipe, SIZES)
    engine, stage = start_engine(recipe, SIZES), make_stage(recipe.stage, shift=1.0)
    engine.record_layers(partial(RepeatedWork, engine))
    assert [iterate(engine, stage, make_batch(iteration)) for iteration in range(3)] == steps
    assert all(torch.equal(engine.parameters[name], weight) for name, weight in weights.items())
    batch = make_batch(0, invalid=None)
    given = batch.latents, torch.linspace(0.1, 0.9, len(batch)), Conditions(batch.text, batch.pooled)
    adapted = engine.velocity(*given)
    reference = engine.velocity(*given, weights="reference")
    with torch.no_grad():
        for name in engine.adapters.names:
            engine.parameters[name].zero_()
    assert torch.equal(engine.velocity(*given), reference)
    assert not torch.equal(adapted, reference)


def test_garbage_waits_for_a_recording():
    """Where an engine before this one is part of a cycle, its graphs end with the cycle."""
    gone = []

    class Engine:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            gone.append(self)

    def make_garbage() -> None:
        Engine()
        kept = [[] for _ in range(100_000)]  # far beyond what sets off a collection
        assert len(kept) == 100_000

    with garbage_waits():
        make_garbage()
        assert not gone
    make_garbage()
    assert gone


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"transformer_impl": "transformer_engine", "fp8": "hybrid"}, None),
        ({"transformer_impl": "transformer_engine", "attention_backend": "auto"}, "attention_backend=auto"),
        (
            {"transformer_impl": "transformer_engine", "fp8": "e4m3", "fp8_recipe": "delayed"},
            "fp8_recipe=delayed",
        ),
    ],
)
def test_what_no_graph_can_hold_is_named(settings, reason):
    said = why_no_graphs(ModelConfig(**settings))
    assert said is None if reason is None else reason in said


def test_nothing_of_the_warm_ups_is_left_when_recording_begins(monkeypatch):
    """It would lie beside the graphs' memory, two tensors of each stream and layer, where nothing can use it."""
    seen: list[weakref.ref] = []
    forward = RecordedLayer.forward

    def noted(layer, *args, **kwargs):
        forward(layer, *args, **kwargs)
        seen.extend(weakref.ref(x) for x in tensors_of(*layer.outputs) if x is not None)

    class Looking(RepeatedWork):
        def record(self, work):
            assert seen and all(output() is None for output in seen)
            monkeypatch.setattr(RecordedLayer, "forward", forward)
            return super().record(work)

    monkeypatch.setattr(RecordedLayer, "forward", noted)
    recipe = make_recipe()
    engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
    engine.record_layers(partial(Looking, engine))
    iterate(engine, stage, make_batch(0))
