"""Encoders whose weights are broken are refused when they are loaded, before everything that they make is."""

from pathlib import Path

from torch import nn


def check_finite(module: nn.Module, folder: Path) -> None:
    """ValueError naming the tensor when the weights loaded from a folder hold NaN or infinite numbers."""
    for name, tensor in module.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"the weights in {folder} hold NaN or infinite numbers: {name}")
