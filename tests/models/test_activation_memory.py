"""What a forward keeps for its backward: as predicted, and divided by context parallelism."""

import contextlib
import time
from unittest import mock

import pytest
import torch
from live_bytes import LiveBytes
from multirank import run_ranks
from peer import SMALL, make_inputs

from soar_mega.config import LoraConfig, ModelConfig, ParallelConfig, Recipe
from soar_mega.distributed import start_world
from soar_mega.layer_checks import RECOMPUTE_MODULES
from soar_mega.models.common.build import build_model
from soar_mega.models.common.lora import add_adapters
from soar_mega.models.common.memory import Workload, rank_memory
from soar_mega.models.common.micro_batches import LIGHT
from soar_mega.models.flux.sizes import FluxSizes
from soar_mega.models.sd3.sizes import SD3Sizes
from soar_mega.stages import SoarConfig

SIZE, TEXT, POINTS = (64, 64), 90, 2  # 1024 tokens of the image; text that is padded where it is cut
SIZES = SD3Sizes(
    **SMALL | {"attention_head_dim": 32, "caption_projection_dim": 128, "pos_embed_max_size": 32}
)
FLUX = FluxSizes(
    num_double_layers=2,
    num_single_layers=2,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    axes_dims_rope=(8, 12, 12),
)
NO_LORA = LoraConfig()
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)


def kernels_that_only_allocate():
    """The fused kernels keep on a GPU what they keep here, where their launches do nothing."""
    patches = contextlib.ExitStack()
    for module in ("adaln", "bias_gelu", "qk_norm_rope"):
        patches.enter_context(mock.patch(f"soar_mega.kernels.{module}.launches", lambda device: True))
    for module in ("adaln", "bias_gelu", "qk_norm_rope", "sums"):
        patches.enter_context(mock.patch(f"soar_mega.kernels.{module}.launch", lambda *args, **options: None))
    return patches


def kept_bytes(parallel, model, sizes=SIZES, lora=NO_LORA):
    """Bytes of this rank's tensors that are alive between forward and backward, weights left out."""
    start_world(parallel)
    chunk = build_model(sizes, model, parallel)
    if lora.rank:
        chunk.requires_grad_(False)
        add_adapters([chunk], lora, seed=0)
    inputs = make_inputs(sizes, SIZE, batch=POINTS, text=TEXT)
    with kernels_that_only_allocate():
        with torch.no_grad():
            chunk(*inputs)  # makes the tables of positions, which are kept for all forwards
        with LiveBytes() as counted:
            velocity = chunk(*inputs)
            assert velocity.requires_grad  # the graph is alive
            time.sleep(0.2)  # gloo's threads let go of the last messages a moment later
            return counted.now


def peak_bytes(model, sizes):
    """The most of them that live at once in a backward that adds the gradients of weights to their sums."""
    start_world(ParallelConfig())
    chunk = build_model(sizes, model, ParallelConfig())
    for parameter in chunk.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    inputs = make_inputs(sizes, SIZE, batch=POINTS, text=TEXT)
    with kernels_that_only_allocate():
        with torch.no_grad():
            chunk(*inputs)
        with LiveBytes() as counted:
            velocity = chunk(*inputs)
            counted.peak = 0
            velocity.backward(torch.ones_like(velocity))
            return counted.peak


def predicted_memory(parallel, model, sizes=SIZES, lora=NO_LORA):
    work = Workload(SIZE, TEXT, POINTS, rows=0, samples=1, micro_batches=1)
    return rank_memory(sizes, Recipe(stage=SoarConfig(), model=model, parallel=parallel, lora=lora), work, 1)


def predicted_bytes(parallel, model, sizes=SIZES, lora=NO_LORA):
    return predicted_memory(parallel, model, sizes, lora).activations


def settings(**changes):
    return ModelConfig(**{"dtype": "fp32", "init": "random"} | changes)


def selective(*modules, **changes):
    return settings(recompute_granularity="selective", recompute_modules=list(modules), **changes)


LIGHTLY = selective(*LIGHT)


@pytest.mark.parametrize(
    "processes, parallel, model, sizes",
    [
        (1, ParallelConfig(), settings(), SIZES),
        (1, ParallelConfig(), settings(dtype="bf16"), SIZES),
        (1, ParallelConfig(), settings(recompute_granularity="full", recompute_every=2), SIZES),
        (1, ParallelConfig(), settings(recompute_granularity="full"), SIZES),
        *[(1, ParallelConfig(), selective(name), SIZES) for name in RECOMPUTE_MODULES],
        (1, ParallelConfig(), selective(*RECOMPUTE_MODULES, dtype="bf16"), SIZES),
        (2, TP2_SP, selective(*RECOMPUTE_MODULES), SIZES),
        pytest.param(
            2, ParallelConfig(tensor_model_parallel_size=2), settings(), SIZES, marks=pytest.mark.slow
        ),
        pytest.param(2, TP2_SP, settings(), SIZES, marks=pytest.mark.slow),
        (1, ParallelConfig(), settings(), FLUX),
        (2, TP2_SP, settings(), FLUX),
        (1, ParallelConfig(), selective(*RECOMPUTE_MODULES), FLUX),
    ],
    ids=[
        "fp32",
        "bf16",
        "every second layer again",
        "every layer again",
        *RECOMPUTE_MODULES,
        "all parts again",
        "all parts again tp2 sp",
        "tp2",
        "tp2 sp",
        "flux",
        "flux tp2 sp",
        "flux all parts again",
    ],
)
def test_kept_bytes_are_the_predicted_ones(processes, parallel, model, sizes):
    for kept in run_ranks(kept_bytes, processes, parallel, model, sizes):
        predicted = predicted_bytes(parallel, model, sizes)
        print(f"kept {kept:,}, predicted {predicted:,} ({predicted / kept - 1:+.1%})")
        assert predicted == pytest.approx(kept, rel=0.04)


@pytest.mark.parametrize("sizes", [SIZES, FLUX], ids=["sd3", "flux"])
def test_linears_without_an_adapter_keep_nothing(sizes):
    lora = LoraConfig(rank=4)  # in attention, not in the MLPs
    [kept] = run_ranks(kept_bytes, 1, ParallelConfig(), settings(), sizes, lora)
    assert predicted_bytes(ParallelConfig(), settings(), sizes, lora) == pytest.approx(kept, rel=0.07)


@pytest.mark.parametrize(
    "model, sizes",
    [(settings(), SIZES), (LIGHTLY, SIZES), (settings(recompute_granularity="full"), SIZES), (LIGHTLY, FLUX)],
    ids=["nothing again", "light", "every layer again", "flux light"],
)
def test_a_backward_holds_no_more_than_is_predicted(model, sizes):
    [peak] = run_ranks(peak_bytes, 1, model, sizes)
    predicted = predicted_memory(ParallelConfig(), model, sizes)
    most = predicted.activations + predicted.temporary
    print(f"at most {peak:,}, predicted {most:,} ({most / peak - 1:+.1%})")
    assert peak <= most < 1.04 * peak


def test_activations_are_divided_by_the_context_parallel_size():
    [whole] = run_ranks(kept_bytes, 1, ParallelConfig(), settings())
    divided = ParallelConfig(context_parallel_size=4)
    kept = max(run_ranks(kept_bytes, 4, divided, settings()))
    print(f"a rank of CP 4 keeps {kept / whole:.3f} of {whole / 1e6:.1f} MB")
    assert kept / whole < 0.3  # conditioning and the velocity are whole on every rank
    assert predicted_bytes(divided, settings()) == pytest.approx(kept, rel=0.04)
