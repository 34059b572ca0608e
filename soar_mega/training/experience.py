"""What a collection left to learn from, until all of it is learned from: on the host, and in checkpoints.

A collection is `updates` global batches. Its tensors are whole [updates, global_batch_size, ...], and a replica holds
the columns that it drew: those are its part of each of these batches, at any number of replicas.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from soar_mega.engines.saved_pieces import SavedPiece
from soar_mega.flow import uniform
from soar_mega.stages.collecting import Trajectories

PREFIX = "experience"  # of its tensors' names in a checkpoint
OF_TRAJECTORIES = tuple(Trajectories.__dataclass_fields__)
ADVANTAGE = "advantage"


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which samples of a collection are this replica's."""

    updates: int
    global_batch_size: int
    replica: int
    replicas: int

    @property
    def count(self) -> int:
        """Samples of a replica in one update."""
        return self.global_batch_size // self.replicas

    def places(self) -> Tensor:
        """[updates, count] int64: their places in the collection."""
        rows = torch.arange(self.updates)[:, None] * self.global_batch_size
        return rows + self.columns()

    def columns(self) -> Tensor:
        """[count] int64: their places in each global batch."""
        return self.replica * self.count + torch.arange(self.count)


class Experience:
    """This replica's part of a collection.

    Args:
        tensors: by name, each [updates, count, ...] on the CPU.
    """

    def __init__(self, share: Share, tensors: Mapping[str, Tensor]) -> None:
        self.share = share
        self.tensors = dict(tensors)

    @staticmethod
    def of(share: Share, drawn: list[Trajectories], advantages: Tensor) -> "Experience":
        """From what was drawn, in the order of the places, and the advantages [N] of the whole collection."""
        leading = (share.updates, share.count)
        tensors = {
            name: torch.cat([getattr(part, name) for part in drawn]).unflatten(0, leading)
            for name in OF_TRAJECTORIES
        }
        return Experience(share, tensors | {ADVANTAGE: advantages[share.places()]})

    def at(self, update: Tensor) -> tuple[Trajectories, Tensor]:
        """Trajectories and advantages [count] of the samples at `update` [count] of each column."""
        column = torch.arange(self.share.count)
        taken = {name: tensor[update, column] for name, tensor in self.tensors.items()}
        advantages = taken.pop(ADVANTAGE)
        return Trajectories(**taken), advantages

    def replace_log_probability(self, update: int, values: Tensor) -> None:
        """Of the samples of an update in their own order: values [count, T] float64."""
        self.tensors["log_probability"][update] = values

    def pieces(self) -> list[SavedPiece]:
        """This replica's part of a checkpoint."""
        shards = _shards(self.share, self.tensors)
        return [
            SavedPiece(f"{PREFIX}.{name}", self.tensors[name].reshape(-1), 0, shards[name]) for name in shards
        ]

    def shapes(self) -> dict[str, Any]:
        """By name, what a sample has of a tensor: its type and shape, for JSON."""
        return {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape[2:])]
            for name, tensor in self.tensors.items()
        }

    def wanted(self) -> dict[str, ShardedTensor]:
        """What to load into this one from a checkpoint, by name."""
        return _shards(self.share, self.tensors)

    @staticmethod
    def empty(share: Share, shapes: Mapping[str, Any]) -> "Experience":
        """One to load into: with the `shapes` of the one that was saved."""
        leading = (share.updates, share.count)
        return Experience(
            share,
            {
                name: torch.empty(*leading, *shape, dtype=getattr(torch, dtype))
                for name, (dtype, shape) in shapes.items()
            },
        )


def order_of_pass(seed: int, position: int, share: Share, number: int) -> Tensor:
    """[updates, count] int64: from which update the samples of each column come in a pass over a collection.

    The first pass takes them as they were drawn. In each further one a column has a keyed order of its own: samples
    meet others, and stay with the replica that has them.

    Args:
        position: of the collection's first sample in the training sequence.
        number: of the pass; the first one is 0.
    """
    if number == 0:
        return torch.arange(share.updates)[:, None].expand(-1, share.count)
    places = share.places()
    drawn = uniform(seed, "experience", position + places.flatten(), number)[:, 0]
    return drawn.view_as(places).argsort(dim=0)


def _shards(share: Share, tensors: Mapping[str, Tensor]) -> dict[str, ShardedTensor]:
    """How those with anything in them are cut over replicas, as megatron says it; all ranks of one have the same."""
    rank = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_and_context_parallel_rank(),
    )
    return {
        name: ShardedTensor.from_rank_offsets(
            f"{PREFIX}.{name}", tensor, (1, share.replica, share.replicas), replica_id=rank
        )
        for name, tensor in tensors.items()
        if tensor.numel()
    }
