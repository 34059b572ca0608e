"""Kept weights take the place of the current ones and leave again, to the bit, for the memory of this rank's parts."""

import pytest
from deepspeed_cases import PATTERNS
from engine_cases import iterate, make_batch, make_recipe, start_engine
from live_bytes import LiveBytes
from multirank import run_ranks

from soar_mega.stages import SftConfig, make_stage

NOISE = 2**12  # bytes of bookkeeping
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
FP32, BF16 = {}, {"model": {"dtype": "bf16"}}
ENGINES = {
    "megatron": [FP32, BF16, FP32 | OVERLAP, BF16 | OVERLAP, BF16 | {"use_distributed_optimizer": False}],
    "deepspeed": [
        FP32 | {"zero_stage": 0},
        BF16 | {"zero_stage": 1},
        FP32 | {"zero_stage": 1},
        BF16 | {"zero_stage": 2},
        FP32 | {"zero_stage": 2, "offload_optimizer": True},
        FP32 | {"zero_stage": 3},
        BF16 | {"zero_stage": 3},
    ],
}


def swap(recipes) -> None:
    for recipe in recipes:
        engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
        engine.keep_weights("old")
        engine.keep_weights("ema")
        iterate(engine, stage, make_batch(0, 2, None))
        swap_around(engine)  # right after a step, when parts of the parameters may not have been gathered yet
        assert iterate(engine, stage, make_batch(1, 2, None))[1].ok


def swap_around(engine) -> None:
    main = engine._main
    parts = {name: piece.flat.clone() for name, piece in main.pieces.items()}
    dtype = next(iter(engine.parameters.values())).dtype
    trained = [name for name, p in engine.parameters.items() if p.requires_grad]
    expected = {
        kept: {name: main.gather(pieces.__getitem__, name, dtype) for name in trained}
        for kept, pieces in {
            "current": parts,
            **{name: one.pieces for name, one in engine.weights.items()},
        }.items()
    }
    frozen = {name: main.value(name).clone() for name in engine.parameters if name not in trained}
    assert frozen

    def assert_shown(kept: str) -> None:
        for name, tensor in (expected[kept] | frozen).items():
            assert main.value(name).equal(tensor), f"{kept} {name}"

    with LiveBytes() as live, engine.using("ema"):
        pass
    own = sum(part.nbytes for part in parts.values())
    assert live.peak <= own + NOISE, f"{live.peak} bytes for parts of {own}"
    with pytest.raises(KeyError), engine.using("ema"):
        assert_shown("ema")
        with engine.using("old"):
            assert_shown("old")
            with engine.using("ema"):
                assert_shown("ema")
            assert_shown("old")
        assert_shown("ema")
        raise KeyError
    assert_shown("current")
    assert all(piece.flat.equal(parts[name]) for name, piece in main.pieces.items())
    assert any(not expected["current"][name].equal(expected["ema"][name]) for name in trained)


@pytest.mark.parametrize("kind", ["megatron", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_swapping_is_exact_and_costs_this_ranks_parts(kind):
    common = {"stage": SftConfig(), "train": {"global_batch_size": 2}, "optimizer": PATTERNS}
    recipes = [make_recipe(engine=kind, **common, **settings) for settings in ENGINES[kind]]
    run_ranks(swap, 2, recipes)
