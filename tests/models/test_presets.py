"""The published models at their exact sizes, on the meta device."""

from pathlib import Path

import pytest

from soar_mega.config import ParallelConfig
from soar_mega.models.common.gather import full_shape
from soar_mega.models.common.names import named_tensors
from soar_mega.models.common.summary import meta_model, parameters_per_rank, summarize
from soar_mega.models.sd3.mapping import entries
from soar_mega.models.sd3.presets import PRESETS

DATA = Path(__file__).parent / "data"
COUNTS = {"sd35_medium": (2_243_171_520, 909), "sd35_large": (8_056_627_520, 1227)}


def reference(name):
    """diffusers' state-dict keys and shapes."""
    lines = (DATA / f"{name}_keys.txt").read_text().splitlines()
    pairs = (line.split("\t") for line in lines if line)
    return {key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for key, shape in pairs}


@pytest.mark.parametrize("name", PRESETS)
def test_counts_keys_and_shapes(name):
    config, (parameters, keys) = PRESETS[name], COUNTS[name]
    model = meta_model(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    table = entries(config)
    expected = reference(name)
    assert len(expected) == keys
    assert {key: entry.shape for entry in table for key in entry.keys} == expected
    ours = {n: tuple(full_shape(t)) for n, t in named_tensors(model).items()}
    assert ours == {e.name: (e.shape[0] * len(e.keys), *e.shape[1:]) for e in table}
    assert {t.device.type for t in named_tensors(model).values()} == {"meta"}


def parallel(tensor=1, pipeline=1, chunks=None):
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks,
    )


def test_large_split_is_uneven_and_complete():
    model = meta_model(PRESETS["sd35_large"])
    for chunks in (1, 2):
        parts = parameters_per_rank(model, parallel(pipeline=4, chunks=chunks))
        assert len(parts) == 4 and sum(parts) == COUNTS["sd35_large"][0]
        assert max(parts) < 1.15 * min(parts)
    [whole], [half] = parameters_per_rank(model, parallel()), parameters_per_rank(model, parallel(tensor=2))
    assert whole / 2 < half < whole / 2 * 1.01


def test_summary_says_counts_and_split():
    text = summarize("sd35_medium", parallel(tensor=2, pipeline=4))
    assert "2,243,171,520 parameters" in text
    assert "stage 3:   327,064,128  layers 16..23" in text
    assert "context parallel size at TP 2: 1, 2, 3, 4, 6, 12\n" in text
    text = summarize("sd35_medium", parallel(tensor=2, pipeline=4, chunks=2))
    assert "layers 8..10, 20..23" in text


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("sd35_huge", parallel(), "neither a pipeline folder nor a preset"),
        ("sd35_large", parallel(tensor=4), "38 attention heads of this model; possible are 1, 2, 19, 38"),
    ],
)
def test_summary_of_the_impossible(name, layout, message):
    with pytest.raises(ValueError, match=message):
        summarize(name, layout)
