"""Lengths and heads while streams are cut over ranks; what the ranks compute is in test_mmdit_layouts.py."""

import pytest

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.models.common.build import transformer_config
from soar_mega.models.common.sequence_shards import attention_config, padded_length, sequence_shards
from soar_mega.models.sd3.presets import PRESETS


def config(tensor=1, context=1, sequence=False):
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, context_parallel_size=context, sequence_parallel=sequence
    )
    return transformer_config(PRESETS["sd35_medium"], ModelConfig(), parallel)


@pytest.mark.parametrize(
    ("layout", "shards", "padded"),
    [
        ((1, 1), 1, 333),
        ((2, 1), 1, 333),
        ((2, 1, True), 2, 336),
        ((1, 3), 3, 336),
        ((2, 2), 2, 336),
        ((2, 3, True), 6, 336),
        ((4, 6, True), 24, 336),
        ((3, 3, True), 9, 432),
    ],
)
def test_lengths_divide_by_the_ranks_and_the_tile(layout, shards, padded):
    assert (sequence_shards(config(*layout)), padded_length(333, config(*layout))) == (shards, padded)


def test_attention_itself_knows_nothing_of_context_parallelism():
    """Transformer Engine would exchange keys and values again, and expects the heads that it will see."""
    whole, inside = config(2, 3), attention_config(config(2, 3))
    assert (whole.context_parallel_size, whole.num_attention_heads) == (3, 24)
    assert (inside.context_parallel_size, inside.num_attention_heads, inside.num_query_groups) == (1, 8, 8)
    assert inside.tensor_model_parallel_size == 2 and inside.kv_channels == 64
