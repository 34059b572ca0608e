"""What an engine wants of a checkpoint without ever holding all of it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor


class OnDemand(dict[str, Any]):
    """Sharded tensors without data, or small dicts of them, by name: a part of what an engine loads.

    What is loaded for it is asked for item by item, so that a rank holds a few of them at a time.
    """


def without_room(like: Tensor) -> Tensor:
    """A float32 tensor of the same shape that has no data."""
    return torch.empty(like.shape, dtype=torch.float32, device="meta")


def in_float32(tensors: Mapping[str, ShardedTensor]) -> OnDemand:
    """Sharded tensors of a model as a checkpoint holds them, not rounded to the type that the model computes with."""
    return OnDemand(
        {name: replace(t, data=without_room(t.data), dtype=torch.float32) for name, t in tensors.items()}
    )
