"""Layers as graphs: the bookkeeping of recordings, on a CPU (tests/gpu has the graphs themselves)."""

from functools import partial

import pytest
import torch
from engine_cases import EIGHT_LAYERS, SIZES, VPP2, iterate, make_batch, make_recipe, start_engine
from multirank import run_ranks
from repeated_work import RepeatedWork

from soar_mega.stages import make_stage

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "one": ((1, 1), 1, {}),
    "recomputed": ((1, 1), 1, {"model": {"recompute_granularity": "full", "recompute_every": 2}}),
    "frozen": (
        (1, 1),
        1,
        {"optimizer": {"frozen": ["context_embedder.*", "time_text_embed.*", "layers.1.*"]}},
    ),
    "dp2": ((1, 1), 2, OVERLAP),
    "tp2-sp": ((2, 1), 2, {"sequence_parallel": True}),
    "pp2": ((1, 2), 2, {}),
    "pp2-vpp2": ((1, 2), 2, VPP2),
}


def trained(recipe, graphs: bool, sizes=SIZES) -> dict:
    """Weights and statistics after three steps."""
    engine, stage = start_engine(recipe, sizes), make_stage(recipe.stage, shift=1.0)
    if graphs:
        engine.record_layers(partial(RepeatedWork, engine))
    found = [iterate(engine, stage, make_batch(iteration)) for iteration in range(3)]
    return {"steps": found, "weights": {name: p.detach().clone() for name, p in engine.parameters.items()}}


@pytest.mark.parametrize("name", LAYOUTS)
def test_recorded_layers_train_as_others_do(name):
    layout, processes, settings = LAYOUTS[name]
    recipe = make_recipe(layout, **settings)
    sizes = EIGHT_LAYERS if "vpp" in name else SIZES
    plain = run_ranks(trained, processes, recipe, False, sizes)
    graphed = run_ranks(trained, processes, recipe, True, sizes)
    for one, other in zip(graphed, plain, strict=True):
        assert one["steps"] == other["steps"]
        assert all(torch.equal(one["weights"][key], weight) for key, weight in other["weights"].items())
