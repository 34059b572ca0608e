"""What an environment keeps when soar_mega is installed into it."""

import keep_torch
import pytest


@pytest.mark.parametrize(
    "triton, numpy, expected",
    [
        ("3.6.0", "2.3.5", "numpy==2.3.5"),
        ("3.6.0+git1a2b", "2.5.5", "numpy<2.4"),
        ("3.6.0", None, "numpy<2.4"),
        ("3.7.1", "2.5.5", "numpy==2.5.5"),
        (None, "2.5.5", "numpy==2.5.5"),
    ],
)
def test_triton_that_cannot_interpret_with_a_newer_numpy(triton, numpy, expected) -> None:
    found = {"torch": "2.11.0+cu130", "triton": triton, "numpy": numpy}
    found = {name: version for name, version in found.items() if version}
    lines = keep_torch.constraints(found)
    assert expected in lines and "torch==2.11.0+cu130" in lines and len(lines) == 2 + bool(triton)
