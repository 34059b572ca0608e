"""Launches are tried by what a GPU would run, and the table is as before afterwards."""

import copy

import pytest
import torch
import tune_kernels
from kernel_cases import all_cases

from soar_mega.kernels.adaln import adaln
from soar_mega.kernels.tables import LAUNCHES, Launch


@pytest.mark.parametrize("model", tune_kernels.MODELS)
def test_candidates_are_what_is_launched(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = copy.deepcopy(LAUNCHES)
    sweep = tune_kernels.sweeps(model)[0]
    launched: list[tuple[int, int]] = []

    def launch(kernel: object, grid: object, device: object, *args: object, **options: int) -> None:
        launched.append((options["ROWS"], options["num_warps"]))

    monkeypatch.setattr("soar_mega.kernels.adaln.launch", launch)
    call = all_cases()[sweep.case](torch.device("meta")).fused

    def measure(calls: list[object]) -> float:
        call()
        return 1.0 if launched[-1] == (8, sweep.num_warps[0]) else 2.0

    found = tune_kernels.times(sweep, [call], measure)
    assert launched == [(tried.block, tried.num_warps) for tried in sweep.candidates()]
    assert len(set(launched)) == len(launched) > 5
    assert f"best 1000000.0 us by {Launch(8, sweep.num_warps[0])}" in tune_kernels.words(sweep, found)
    assert before == LAUNCHES
    call()
    assert launched[-1] == launched[0]  # by the table again, not by the last candidate
    residual = torch.randn(3, 2, 16)
    adaln(residual, residual[0], residual[0])  # goes on as before


def test_each_class_is_in_the_table_and_each_case_is_there() -> None:
    for model in tune_kernels.MODELS:
        for sweep in tune_kernels.sweeps(model):
            assert sweep.case in all_cases() and len(sweep.candidates()) >= 6
