"""Random weights drawn on the device: of billions, a CPU draws longer than all steps that a tool measures take."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from soar_mega.models.common import build
from soar_mega.models.common.transformer import Transformer


@contextlib.contextmanager
def drawn_on_device() -> Iterator[None]:
    """Models that are built within have other random weights than a run's, none of them zero."""
    with mock.patch.object(build, "initialize", draw):
        yield


@torch.no_grad()
def draw(model: Transformer, seed: int) -> None:
    """In the place of soar_mega.models.common.initialize."""
    generator = None
    for parameter in model.parameters():
        generator = generator or torch.Generator(parameter.device).manual_seed(seed)
        parameter.normal_(std=0.02, generator=generator)
    model.fill_buffers()
