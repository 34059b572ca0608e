"""A step tells the device what to do and waits for nothing but its gradient norm, with few collectives."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from collecting_cases import Collecting, collected_batch, collecting_recipe, learn_once, with_kept_weights
from engine_cases import SOAR, VPP2, make_batch, make_recipe, start_engine
from gpu_stand_in import Seen, is_on_cpu, nccl_alone
from multirank import run_ranks
from test_branches import VARIED

from soar_mega.config import Recipe
from soar_mega.distributed import device
from soar_mega.stages import make_stage

# what the engine itself reduces; pipeline messages and tensor parallelism are the model's
GRADIENTS = ("reduce_scatter_tensor_coalesced_", "DATA_PARALLEL_GROUP_WITH_CP")  # of each chunk of the model
COLLECTIVES = {
    ("allreduce_", "DATA_PARALLEL_GROUP"): 1,  # counts
    ("allreduce_", "default_pg"): 1,  # statistics
    ("allreduce_", "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP"): 1,  # the gradient norm
}
MESSAGES = ("send", "recv_")


def two_steps(recipe: Recipe) -> Seen:
    """What a process does in its second step; in the first one libraries make what they keep."""
    with nccl_alone() as seen:
        engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
        for step in range(2):
            batch = make_batch(step)
            seen.collectives.clear()
            seen.waits.clear()
            answers = engine.answer(stage.queries, batch)
            statistics = engine.learn(stage.points, stage.loss, batch, answers)
            assert engine.step(1e-3).ok and statistics["points"] > 0
    return seen


def two_steps_of_own_samples(recipe: Recipe) -> Seen:
    """The same of a method that collects: it measures, is guided, asks kept weights, observes and moves a copy."""
    with nccl_alone() as seen:
        engine, stage = with_kept_weights(recipe), Collecting()
        kept = [piece for one in engine.weights.values() for piece in one.pieces.values()]
        assert {is_on_cpu(piece) for piece in kept} == {recipe.train.offload_kept_weights}
        for _ in range(2):
            batch = collected_batch()
            seen.collectives.clear()
            seen.waits.clear()
            engine.measure(stage.points, stage.log_probability, batch)
            statistics = learn_once(engine, stage, batch)
            assert engine.step(1e-3).ok and statistics["ratio"] > 0
            engine.blend_weights("old", 0.5)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"layout": (1, 2)}, marks=pytest.mark.slow),
        {"layout": (1, 2), **VPP2},
        pytest.param({"layout": (1, 2), "stage": VARIED}, marks=pytest.mark.slow),
        pytest.param(
            {"layout": (2, 1), "sequence_parallel": True, "stage": replace(SOAR, fused_kernels=False)},
            marks=pytest.mark.slow,
        ),
        {"engine": "deepspeed", "zero_stage": 1},
    ],
    ids=["pipeline", "two-chunks", "varied", "tensor", "deepspeed"],
)
def test_a_step_waits_for_its_gradient_norm_alone(settings):
    wanted = "_gradient_norm (deepspeed.py" if "engine" in settings else "get_grad_norm ("
    for seen in run_ranks(two_steps, 2, make_recipe(**settings)):
        assert_one_wait(seen, wanted)
        if "engine" not in settings:
            found = Counter(
                (operation, group)
                for operation, group in seen.collectives
                if operation not in MESSAGES and group != "TENSOR_MODEL_PARALLEL_GROUP"
            )
            assert found == COLLECTIVES | {GRADIENTS: settings.get("virtual_pipeline_model_parallel_size", 1)}


def assert_one_wait(seen: Seen, wanted: str) -> None:
    assert seen.waits  # the stand-in sees the one that there is
    for wait in seen.waits:
        assert any(call.startswith(wanted) for call in wait.inside), wait


@pytest.mark.parametrize(
    "settings",
    [
        {"layout": (1, 2), **VPP2, "train": VPP2["train"] | {"offload_kept_weights": True}},
        pytest.param({"engine": "deepspeed", "zero_stage": 2}, marks=pytest.mark.slow),
    ],
    ids=["two-chunks-copies-on-host", "deepspeed"],
)
def test_nor_does_a_step_on_own_samples_wait_for_more(settings):
    wanted = "_gradient_norm (deepspeed.py" if "engine" in settings else "get_grad_norm ("
    for seen in run_ranks(two_steps_of_own_samples, 2, collecting_recipe(**settings)):
        assert_one_wait(seen, wanted)
        if "engine" not in settings:  # the statistics come with what was reduced before
            found = Counter(operation for operation, _ in seen.collectives)
            assert found["allreduce_"] == sum(COLLECTIVES.values())


def hidden_waits() -> dict[str, int]:
    """How many waits the stand-in sees in each of these."""
    calls = {
        "item": lambda x, y: x.sum().item(),
        "bool": lambda x, y: bool(x.any()),
        "int": lambda x, y: int(x[0]),
        "tolist": lambda x, y: x.tolist(),
        "nonzero": lambda x, y: x.nonzero(),
        "mask": lambda x, y: x[x > 0],
        "index of the host": lambda x, y: x[y],
        "put at an index of the host": lambda x, y: x.index_put_((y,), x[:2].clone()),
        "unique": lambda x, y: x.unique(),
        "equal": lambda x, y: torch.equal(x, x),
        "to the host": lambda x, y: x.cpu(),
        "to the device": lambda x, y: y.to(device()),
        "copied over": lambda x, y: x[:2].copy_(y),
        "made of a list": lambda x, y: torch.tensor([1.0], device=device()),
        "made of values": lambda x, y: torch.tensor([x[0], x[1]]),
        # these wait for nothing
        "fine: goes on": lambda x, y: y.to(device(), non_blocking=True),
        "fine: comes back": lambda x, y: torch.empty(4).copy_(x, non_blocking=True),
        "fine: by the device's index": lambda x, y: x[x.long()],
        "fine: on the host": lambda x, y: [y.tolist(), y.unique(), bool(y.any()), y[y > 0]],
        "fine: made there": lambda x, y: torch.zeros(3, device=device()),
    }
    found = {}
    with nccl_alone() as seen:
        x, y = torch.ones(4, device=device()), torch.tensor([0, 1])
        for name, call in calls.items():
            seen.waits.clear()
            call(x, y)
            found[name] = len(seen.waits)
    return found


def test_the_stand_in_knows_what_waits():
    for name, waits in run_ranks(hidden_waits, 1)[0].items():
        assert bool(waits) != name.startswith("fine"), name
