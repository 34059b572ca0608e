"""The memory model says what engines allocate, rank by rank."""

from dataclasses import replace

import pytest
from engine_cases import EIGHT_LAYERS, SHAPE, TEXT, make_recipe
from memory_cases import held_bytes
from multirank import run_ranks

from soar_mega.distributed import data_size, start_world
from soar_mega.models.memory import rank_memory, workload

WIDE = replace(EIGHT_LAYERS, attention_head_dim=32, caption_projection_dim=128)
BF16 = {"dtype": "bf16"}
LARGEST = 4 * 9 * WIDE.hidden_size**2  # bytes of a dual layer's modulation
# those of a line have the same groups, and follow each other in the same processes
LAYOUTS = {
    "tp2 dp2": [
        make_recipe((2, 1), model=BF16, train={"ema_decay": 0.9}),
        make_recipe((2, 1), engine="deepspeed", zero_stage=0),
        make_recipe((2, 1), model=BF16, engine="deepspeed", zero_stage=1),
    ],
    "pp2 dp2": [make_recipe((1, 2), model=BF16), make_recipe((1, 2), use_distributed_optimizer=False)],
    "pp2 tp2": [make_recipe((2, 2), sequence_parallel=True)],
    "pp2 vpp2 cp2": [
        make_recipe((1, 2), model=BF16, virtual_pipeline_model_parallel_size=2, context_parallel_size=2)
    ],
    "dp4": [
        make_recipe((1, 1), model=BF16, overlap_grad_reduce=True),
        make_recipe((1, 1), engine="deepspeed", zero_stage=1),
        make_recipe((1, 1), model=BF16, engine="deepspeed", zero_stage=2),
        make_recipe((1, 1), model=BF16, engine="deepspeed", zero_stage=3),
    ],
}


def compared(recipes):
    """For each recipe what this rank holds, by kind, and what is predicted."""
    from megatron.core import parallel_state

    found = []
    for recipe in recipes:
        start_world(recipe.parallel)
        rank = parallel_state.get_pipeline_model_parallel_rank()
        predicted = rank_memory(
            WIDE, recipe, workload(recipe, data_size(), SHAPE[1:], TEXT), data_size(), rank
        )
        held = held_bytes(recipe, WIDE)
        found.append({kind: (count, getattr(predicted, kind)) for kind, count in held.items()})
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_gradients_and_optimizer_are_what_engines_allocate(layout):
    ranks = run_ranks(compared, 4, LAYOUTS[layout])
    for rank, found in enumerate(ranks):
        for recipe, kinds in zip(LAYOUTS[layout], found, strict=True):
            for kind, (held, predicted) in kinds.items():
                print(
                    f"rank {rank}: {kind} {held:,}, predicted {predicted:,} ({predicted / max(held, 1) - 1:+.1%})"
                )
                # at ZeRO 1 and 2 both owners of a parameter keep its whole gradient
                assert predicted == pytest.approx(held, rel=0.05, abs=LARGEST), (kind, recipe.parallel)
