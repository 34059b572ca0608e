"""Tiny random weights, written once."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from soar_mega.evaluation.scorers.tiny import WRITERS, write_tiny_weights


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the files of all scorers; nobody changes them."""
    folder = tmp_path_factory.mktemp("weights")
    for name in WRITERS:
        write_tiny_weights(name, folder)
    return folder


@pytest.fixture(scope="session")
def images() -> Tensor:
    """[3, 3, 41, 64] in [0, 1], smooth enough that a filter is not all that counts."""
    coarse = torch.rand(3, 3, 6, 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (41, 64), mode="bicubic").clamp(0, 1)
