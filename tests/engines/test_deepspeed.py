"""DeepSpeed computes what megatron computes, at every ZeRO stage, and each can go on from the other's checkpoints."""

import functools
from dataclasses import replace

import pytest
import torch
from deepspeed_cases import PATTERNS, behaviour, link, megatron_recipe, zero_recipe
from engine_cases import PARTS_AGAIN, SIZES, assert_gradients_agree, train_case
from multirank import run_ranks

from soar_mega.config import CheckpointConfig, DataConfig, ParallelConfig, Recipe
from soar_mega.config_checks import check_recipe
from soar_mega.engines import make_engine
from soar_mega.stages import SoarConfig

ITERATIONS = 2
# the first and the last layer; between the others goes an open sum, with a bias that is another module's
RECOMPUTED = {"recompute_granularity": "full", "recompute_every": 3}
LAYOUTS = {  # ZeRO stage, TP, processes, further settings
    "zero0-tp2-dp2": (0, 2, 4, {"model": PARTS_AGAIN}),
    "zero1-tp2-dp2-sp": (1, 2, 4, {"sequence_parallel": True}),
    "zero2-tp2-dp2": (2, 2, 4, {}),
    "zero3-tp2-dp2-sp": (3, 2, 4, {"sequence_parallel": True, "model": RECOMPUTED}),
}
MORE_LAYOUTS = {
    f"zero{stage}-tp{tp}-dp{n // tp}": (stage, tp, n, {})
    for stage in range(4)
    for tp, n in ((1, 1), (1, 2), (2, 2), (2, 4))
} | {"zero3-parts-again": (3, 2, 4, {"model": PARTS_AGAIN})}
OFFLOADED = {"offload_optimizer": True}
BEHAVIOURS = {
    "zero0": (0, {}),
    "zero1-offload": (1, OFFLOADED),
    "zero2": (2, {}),
    "zero2-offload": (2, OFFLOADED),
    "zero3": (3, {}),
    "zero3-offload": (3, OFFLOADED | {"offload_parameters": True}),
}
QUICK = ("zero2-offload", "zero3")


@functools.cache
def single_process(case):
    arguments = (
        (megatron_recipe(optimizer=PATTERNS),) if case is behaviour else (megatron_recipe(), ITERATIONS)
    )
    [result] = run_ranks(case, 1, *arguments)
    return result


def check_layout(stage, tp, processes, settings):
    expected = single_process(train_case)
    for found in run_ranks(train_case, processes, zero_recipe(stage, tp, **settings), ITERATIONS):
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for ours, theirs in zip(found["statistics"], expected["statistics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert_gradients_agree(found["gradients"], expected["gradients"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_that_of_one_process(layout):
    check_layout(*LAYOUTS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_training_is_that_of_one_process_at_every_layout(layout):
    check_layout(*MORE_LAYOUTS[layout])


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in BEHAVIOURS]
)
def test_every_call_answers_as_megatrons(case):
    stage, settings = BEHAVIOURS[case]
    expected = single_process(behaviour)
    for found in run_ranks(behaviour, 2, zero_recipe(stage, optimizer=PATTERNS, **settings)):
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert found["step"] == expected["step"] == 4
        velocities = [key for key in expected if "velocity" in key]
        assert len(velocities) == 9
        for key in velocities:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5, msg=key)
        for weights in ("current", "ema"):
            for name, tensor in expected[weights].items():
                # an entry whose gradient is rounding noise may move by a step of Adam in either direction
                assert (found[weights][name] - tensor).abs().mean() < 1e-6, f"{weights} {name}"


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_bf16_stays_near_fp32(stage):
    expected = single_process(train_case)
    found = run_ranks(train_case, 2, zero_recipe(stage, model={"dtype": "bf16"}), ITERATIONS)[0]
    for ours, theirs in zip(found["statistics"], expected["statistics"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
    assert found["norms"] == pytest.approx(expected["norms"], rel=2e-2)


CHAINS = {
    "megatron-zero2-megatron": [
        (megatron_recipe(), 1),
        (zero_recipe(2), 2),
        (megatron_recipe(2), 2),
    ],
    "zero3-zero1-zero0": [
        (zero_recipe(3, offload_optimizer=True), 2),
        (zero_recipe(1, 2), 2),
        (zero_recipe(0), 1),
    ],
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    [found] = run_ranks(link, 1, megatron_recipe(), None, str(tmp_path_factory.mktemp("whole")), range(3))
    return found


@pytest.mark.parametrize(
    "chain", ["megatron-zero2-megatron", pytest.param("zero3-zero1-zero0", marks=pytest.mark.slow)]
)
def test_each_engine_goes_on_from_the_others_checkpoint(chain, tmp_path, uninterrupted):
    numbers, ema, loaded = [], {}, None
    for i, (recipe, processes) in enumerate(CHAINS[chain]):
        saved = tmp_path / str(i)
        saved.mkdir()
        ranks = run_ranks(link, processes, recipe, loaded, str(saved), range(i, i + 1))
        assert all(rank[0] == ranks[0][0] for rank in ranks)
        numbers += ranks[0][0]
        ema, loaded = ranks[0][1], str(saved)
    expected, expected_ema = uninterrupted
    assert numbers == pytest.approx(expected, rel=1e-5)
    assert all((ema[name] - tensor).abs().mean() < 1e-6 for name, tensor in expected_ema.items())


def with_parallel(**parallel):
    recipe = zero_recipe(2)
    recipe.checkpoint, recipe.data = CheckpointConfig(save="runs/x"), DataConfig(path="shards")
    recipe.model.preset, recipe.stage = "sd35_medium", replace(recipe.stage, shift=3.0)
    recipe.parallel = replace(recipe.parallel, **parallel)
    return recipe


@pytest.mark.parametrize(
    "parallel, words",
    [
        ({"zero_stage": 4}, "parallel.zero_stage is 4: it must be between 0 and 3"),
        (
            {"pipeline_model_parallel_size": 2},
            "no pipeline parallelism: set .*pipeline_model_parallel_size=1",
        ),
        ({"context_parallel_size": 2}, "no context parallelism: set parallel.context_parallel_size=1"),
        (
            {"zero_stage": 0, "offload_optimizer": True},
            "offload_optimizer needs parallel.zero_stage=1, 2 or 3",
        ),
        ({"offload_parameters": True}, "offload_parameters needs parallel.zero_stage=3"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(parallel, words):
    check_recipe(with_parallel())
    with pytest.raises(ValueError, match=words):
        check_recipe(with_parallel(**parallel))


def test_bf16_sums_are_refused():
    recipe = with_parallel(zero_stage=0)
    check_recipe(recipe)
    recipe.model.dtype = "bf16"
    with pytest.raises(ValueError, match="in bf16: set parallel.zero_stage=1"):
        check_recipe(recipe)


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="choose megatron or deepspeed"):
        make_engine(Recipe(stage=SoarConfig(), parallel=ParallelConfig(engine="fsdp")), SIZES)
