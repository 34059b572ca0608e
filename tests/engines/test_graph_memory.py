"""Recordings of layers find at each replay what they need in their memory, on a CPU (tests/gpu has the graphs).

What is freed while a recording is made is used again by those made after it, and the replays of several micro-batches
take turns. What is freed until the backward must be made again by the replay itself.
"""

import functools
from unittest import mock

import pytest
import torch
from engine_cases import EIGHT_LAYERS, SIZES, VPP2, make_recipe
from fixed_addresses import FixedAddresses, Pool, compile_pools
from multirank import run_ranks
from test_layer_graphs import FLUX, LORA, trained

from soar_mega.models.common import recompute

# single results, which are freed until the backward
LIGHT = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp_act", "qk_layernorm"]}
CASES = {  # processes, settings and sizes
    "all kept": (1, {}, SIZES),
    "made again": (1, {"model": LIGHT}, SIZES),
    "lora": (1, {"model": LIGHT, "lora": vars(LORA)}, SIZES),
    "pp2-vpp2": (2, {"layout": (1, 2), "model": LIGHT, **VPP2}, EIGHT_LAYERS),
    "flux": (1, {"model": LIGHT}, FLUX),
}
QUICK = "made again"


class OnePool(FixedAddresses):
    """A mistake: all recordings share their memory, also those of micro-batches on their way at the same time."""

    make_pool = staticmethod(functools.cache(Pool))


class NotMadeAgain(FixedAddresses):
    """A mistake: what is freed until the backward gets memory again, and nothing is written there."""

    def record(self, work):
        freed = recompute._Freed
        with mock.patch.object(recompute, "_Freed", lambda tensors, make: freed(tensors, lambda out: None)):
            return super().record(work)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_pools(tmp_path_factory.mktemp("library"))


def trains_the_same(recorder, library: str, recipe, sizes) -> bool:
    """Whether three steps, and the weights after them, are the same to the last bit with and without recordings."""
    steps, weights = trained(recipe, sizes)
    recorded_steps, recorded_weights = trained(recipe, sizes, functools.partial(recorder, library))
    same = [torch.equal(recorded_weights[name], weight) for name, weight in weights.items()]
    return recorded_steps == steps and all(same)


def on_all_ranks(case: str, recorder, library: str) -> bool:
    processes, settings, sizes = CASES[case]
    return all(run_ranks(trains_the_same, processes, recorder, library, make_recipe(**settings), sizes))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == QUICK else pytest.mark.slow) for case in CASES]
)
def test_replays_compute_what_layers_do(case, library):
    assert on_all_ranks(case, FixedAddresses, library)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mistake"), [("pp2-vpp2", OnePool), ("made again", NotMadeAgain)])
def test_mistakes_are_seen(case, mistake, library):
    assert not on_all_ranks(case, mistake, library)
