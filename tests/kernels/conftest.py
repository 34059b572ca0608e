"""Kernels are interpreted where a test asks for it, and run as their eager twins elsewhere."""

import pytest


@pytest.fixture(params=["eager", "interpreted"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways a CPU tensor can go."""
    if request.param == "interpreted":
        request.getfixturevalue("interpreted")
    return request.param


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go to the Triton source."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
