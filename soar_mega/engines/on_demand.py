"""What an engine wants of a checkpoint without ever holding all of it."""

from typing import Any

import torch
from torch import Tensor


class OnDemand(dict[str, Any]):
    """Sharded tensors without data, or small dicts of them, by name: a part of what an engine loads.

    What is loaded for it is asked for item by item, so that a rank holds a few of them at a time.
    """


def without_room(like: Tensor) -> Tensor:
    """A float32 tensor of the same shape that has no data."""
    return torch.empty(like.shape, dtype=torch.float32, device="meta")
