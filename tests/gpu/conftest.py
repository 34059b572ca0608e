"""What runs on a GPU only: `make test-gpu`, or tools/gpu_check.sh, which also writes down what came out."""

import sys
from pathlib import Path

import pytest
import torch

from soar_mega import platform

HERE = Path(__file__).parent
# the helpers of their tests, and the tools
sys.path[:0] = [
    str(HERE.parent / folder) for folder in ("", "kernels", "models", "engines", "data", "../tools")
]
platform.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
