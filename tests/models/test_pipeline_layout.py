"""Stages get even work, or the layers that the recipe gives them; what cannot be is refused with what can."""

import itertools
from dataclasses import replace

import pytest

from soar_mega.config import ParallelConfig
from soar_mega.models.common import flops
from soar_mega.models.common.pipeline_layout import rank_layers, stage_layers, stage_work
from soar_mega.models.sd3 import work as sd3_work
from soar_mega.models.sd3.presets import PRESETS

LARGE, MEDIUM = PRESETS["sd35_large"], PRESETS["sd35_medium"]  # 38 equal layers; 24, of which 13 are dual
# the most even split in 3 has a slower stage
TINY = replace(MEDIUM, num_layers=5, dual_attention_layers=(1, 4))


def pipeline(ranks, chunks=None, first=None, last=None):
    return ParallelConfig(
        pipeline_model_parallel_size=ranks,
        virtual_pipeline_model_parallel_size=chunks,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
    )


def sizes(config, *settings):
    stages = stage_layers(config, pipeline(*settings))
    assert [n for stage in stages for n in stage] == list(range(config.num_layers))
    return [len(stage) for stage in stages]


@pytest.mark.parametrize(
    "config, settings, expected",
    [
        (LARGE, (4,), [9, 9, 10, 10]),
        (LARGE, (2, 2), [9, 9, 10, 10]),
        (LARGE, (38,), [1] * 38),
        (LARGE, (4, None, 8, 8), [8, 11, 11, 8]),
        (LARGE, (4, None, 8), [8, 10, 10, 10]),
        (LARGE, (3, 2, 10, 12), [5, 8, 6, 5, 8, 6]),
        (LARGE, (2, None, 20, 18), [20, 18]),
        (MEDIUM, (4,), [5, 5, 6, 8]),  # dual layers work half as much again
        (MEDIUM, (1,), [24]),
    ],
)
def test_layers_of_each_stage(config, settings, expected):
    assert sizes(config, *settings) == expected


def test_chunks_of_a_rank_are_every_other_stage():
    stages = stage_layers(LARGE, pipeline(2, 2))
    assert [rank_layers(LARGE, pipeline(2, 2), rank) for rank in (0, 1)] == [stages[0::2], stages[1::2]]


@pytest.mark.parametrize("settings", [(2,), (3,), (2, 2), (3, None, 2), (3, None, None, 1)])
def test_no_split_has_a_faster_slowest_stage(settings):
    parallel = pipeline(*settings)
    tokens = sd3_work.usual_tokens(TINY)
    found_work = [work.total for work in stage_work(TINY, parallel, tokens)]
    works = [sd3_work.layer_work(TINY, n, tokens).total for n in range(5)]
    works[0] += sd3_work.embedding_work(TINY, tokens).total
    works[-1] += flops.output_work(TINY, tokens).total

    def slowest(counts):
        ends = [0, *itertools.accumulate(counts)]
        return max(sum(works[a:b]) for a, b in itertools.pairwise(ends))

    found = sizes(TINY, *settings)
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    every = [
        counts
        for counts in itertools.product(range(1, 6), repeat=len(found))
        if sum(counts) == 5 and first in (None, counts[0]) and last in (None, counts[-1])
    ]
    assert slowest(found) == min(map(slowest, every)) == max(found_work)
    assert sum(found_work) == flops.forward_work(TINY, tokens).total


@pytest.mark.parametrize(
    "config, settings, words",
    [
        (TINY, (6,), "=6 is more than the 5 layers of this model: .* largest possible is 5"),
        (LARGE, (8, 5), "asks for 40 virtual stages, more than the 38 layers .* largest possible here is 4"),
        (
            LARGE,
            (4, None, 36),
            "num_layers=36 leave fewer than one .* each of the 3 other stages: set at most 35",
        ),
        (LARGE, (4, 2, 34), "to each of the 6 other stages: set at most 32"),
        (LARGE, (4, None, 20, 17), "each of the 2 other stages: set together at most 36"),
        (
            LARGE,
            (2, None, 20, 10),
            "do not add up to the 38 .*first_pipeline_num_layers=20 .*last.*_layers=18",
        ),
        (LARGE, (2, 2, 20, 30), "do not add up to the 38 .*first_pipeline_num_layers=20 .*last.*_layers=18"),
        (LARGE, (2, 2, 9), "first_pipeline_num_layers=9 must be a multiple of .*=2: nearest is 8"),
        (LARGE, (1, 2), "interleaves the parts of several pipeline ranks: leave it out, or set .*size=2"),
        (LARGE, (1, None, None, 9), "last_pipeline_num_layers=9 is about several pipeline ranks: leave it"),
    ],
)
def test_impossible_splits_come_with_the_nearest_possible(config, settings, words):
    with pytest.raises(ValueError, match=words):
        stage_layers(config, pipeline(*settings))
