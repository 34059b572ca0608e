"""Random weights by names and shapes."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def norms(*names: str, width: int) -> dict[str, tuple[int, ...]]:
    """Weight and bias of normalisations."""
    return {f"{name}.{kind}": (width,) for name in names for kind in ("weight", "bias")}


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Weight and bias of a linear layer."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Normally distributed, as wide as keeps activations of about 1; what scales is near 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1 and "embed" not in name:
            state[name] = noise * torch.Size(shape[1:]).numel() ** -0.5
        else:
            state[name] = 0.3 * noise + (len(shape) == 1 and name.endswith("weight"))
    return state


def save_pickled(content: object, path: Path) -> None:
    """By torch.save, in a folder that may have to be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
