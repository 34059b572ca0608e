"""What a forward keeps for its backward: as predicted, and divided by context parallelism."""

import contextlib
from unittest import mock

import pytest
from live_bytes import LiveBytes
from multirank import run_ranks
from peer import SMALL, make_inputs

from soar_mega.config import ModelConfig, ParallelConfig, Recipe
from soar_mega.distributed import start_world
from soar_mega.models.config import MMDiTConfig
from soar_mega.models.memory import Workload, rank_memory
from soar_mega.models.mmdit import build_model
from soar_mega.stages import SoarConfig

SIZE, TEXT, POINTS = (64, 64), 90, 2  # 1024 tokens of the image; text that is padded where it is cut
SIZES = MMDiTConfig(
    **SMALL | {"attention_head_dim": 32, "caption_projection_dim": 128, "pos_embed_max_size": 32}
)
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)


def kernels_that_only_allocate():
    """The fused kernels keep on a GPU what they keep here, where their launches do nothing."""
    patches = contextlib.ExitStack()
    for module in ("adaln", "qk_norm_rope"):
        patches.enter_context(mock.patch(f"soar_mega.kernels.{module}.launches", lambda device: True))
        patches.enter_context(mock.patch(f"soar_mega.kernels.{module}.launch", lambda *args, **options: None))
    return patches


def kept_bytes(parallel, model):
    """Bytes of this rank's tensors that are alive between forward and backward, weights left out."""
    start_world(parallel)
    chunk = build_model(SIZES, model, parallel)
    inputs = make_inputs(SIZES, SIZE, batch=POINTS, text=TEXT)
    with kernels_that_only_allocate(), LiveBytes() as counted:
        velocity = chunk(*inputs)
        assert velocity.requires_grad  # the graph is alive
        return counted.now


def predicted_bytes(parallel, model):
    work = Workload(SIZE, TEXT, POINTS, rows=0, samples=1, micro_batches=1)
    return rank_memory(SIZES, Recipe(stage=SoarConfig(), model=model, parallel=parallel), work, 1).activations


def settings(**changes):
    return ModelConfig(**{"dtype": "fp32", "init": "random"} | changes)


@pytest.mark.parametrize(
    "processes, parallel, model",
    [
        (1, ParallelConfig(), settings()),
        (1, ParallelConfig(), settings(dtype="bf16")),
        (1, ParallelConfig(), settings(recompute_granularity="full", recompute_every=2)),
        (1, ParallelConfig(), settings(recompute_granularity="full")),
        (2, ParallelConfig(tensor_model_parallel_size=2), settings()),
        (2, TP2_SP, settings()),
    ],
    ids=["fp32", "bf16", "every second layer again", "every layer again", "tp2", "tp2 sp"],
)
def test_kept_bytes_are_the_predicted_ones(processes, parallel, model):
    for kept in run_ranks(kept_bytes, processes, parallel, model):
        predicted = predicted_bytes(parallel, model)
        print(f"kept {kept:,}, predicted {predicted:,} ({predicted / kept - 1:+.1%})")
        assert predicted == pytest.approx(kept, rel=0.04)


def test_activations_are_divided_by_the_context_parallel_size():
    [whole] = run_ranks(kept_bytes, 1, ParallelConfig(), settings())
    divided = ParallelConfig(context_parallel_size=4)
    kept = max(run_ranks(kept_bytes, 4, divided, settings()))
    print(f"a rank of CP 4 keeps {kept / whole:.3f} of {whole / 1e6:.1f} MB")
    assert kept / whole < 0.3  # conditioning and the velocity are whole on every rank
    assert predicted_bytes(divided, settings()) == pytest.approx(kept, rel=0.04)
