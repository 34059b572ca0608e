"""What is drawn, judged and learned by reinforcement learning is the same at every layout and with every engine."""

import functools
from pathlib import Path
from typing import Any

import pytest
from multirank import run_ranks
from rl_cases import STAGES, behaviour, rl_recipe

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel__tensor_model_parallel_size": 2}),
    "pp2": (2, {"parallel__pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"parallel__context_parallel_size": 2}),
    "tp2-sp-pp2": (
        4,
        {
            "parallel__tensor_model_parallel_size": 2,
            "parallel__sequence_parallel": True,
            "parallel__pipeline_model_parallel_size": 2,
        },
    ),
    "pp2-vpp2": (
        2,
        {
            "parallel__pipeline_model_parallel_size": 2,
            "parallel__virtual_pipeline_model_parallel_size": 2,
        },
    ),
    **{f"zero{n}": (2, {"parallel__engine": "deepspeed", "parallel__zero_stage": n}) for n in (1, 2, 3)},
}
ITERATIONS = 5  # over the end of a collection of 4 updates


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rl")


@functools.cache
def single_process(folder: Path) -> list[dict[str, Any]]:
    [found] = run_ranks(behaviour, 1, recipes(folder), ITERATIONS)
    return found


def recipes(folder: Path, **layout: Any) -> list[Any]:
    return [rl_recipe(folder, stage, **layout) for stage in STAGES]


@pytest.mark.slow  # test_collecting.py has a step at some layouts; test_rl_runs.py draws at one and learns at another
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reinforcement_learning_does_not_depend_on_the_layout(layout: str, folder: Path) -> None:
    processes, settings = LAYOUTS[layout]
    expected = single_process(folder)
    for rank in run_ranks(behaviour, processes, recipes(folder, **settings), ITERATIONS):
        for found, known in zip(rank, expected, strict=True):
            for name, value in known.items():
                error = (found[name] - value).abs().max() / value.abs().max()
                assert error < 1e-5, (name, float(error))
