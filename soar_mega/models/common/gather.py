"""Between a rank's shard of a tensor and the tensor of the single-process layout."""

import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega.models.common.groups import tensor_parallel_group


def full_tensor(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The whole tensor, on every tensor-parallel rank. A collective over that group.

    Args:
        tensor: this rank's shard: a parameter, its gradient, its EMA.
        like: the parameter whose layout `tensor` has; by default the tensor itself.
    """
    dim = partition_dim(tensor if like is None else like)
    group = tensor_parallel_group()
    tensor = tensor.detach()
    if dim is None or group is None or group.size() == 1:
        return tensor
    shape = list(tensor.shape)
    shape[dim] *= group.size()
    full = tensor.new_empty(shape)
    # shard by shard into its place: gathering them in a list would hold everything twice
    for rank, place in enumerate(full.chunk(group.size(), dim=dim)):
        if rank == group.rank():
            place.copy_(tensor)
        shard = place.contiguous()  # rows are sent from and to where they belong
        dist.broadcast(shard, group=group, group_src=rank)
        if shard is not place:
            place.copy_(shard)
    return full


def local_shard(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part (a view) of a whole tensor that is laid out as the parameter `like`."""
    dim = partition_dim(like)
    group = tensor_parallel_group()
    if dim is None or group is None:
        return full
    return full.chunk(group.size(), dim=dim)[group.rank()]


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter in the single-process layout."""
    shape = list(parameter.shape)
    dim = partition_dim(parameter)
    group = tensor_parallel_group()
    if dim is not None and group is not None:
        shape[dim] *= group.size()
    return torch.Size(shape)


def partition_dim(parameter: Tensor) -> int | None:
    """The dimension that a parameter is cut along over TP, or None for a replicated one."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return parameter.partition_dim  # type: ignore[attr-defined]
