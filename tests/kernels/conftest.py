"""Kernels are interpreted where a test asks for it, and run as their eager twins elsewhere."""

import pytest
import torch


@pytest.fixture(params=["eager", "interpreted"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways a CPU tensor can go."""
    if request.param == "interpreted":
        request.getfixturevalue("interpreted")
    return request.param


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go to the Triton source."""
    if torch.cuda.is_available():
        pytest.skip("Triton is compiled on a machine with CUDA: tests/gpu runs it there")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
