"""A short name for weights: by it a checkpoint of adapters knows the weights that they were trained on."""

import hashlib
import json

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from soar_mega.models.common.gather import partition_dim
from soar_mega.models.common.names import named_tensors

BITS = {2: torch.int16, 4: torch.int32}


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> str:
    """The same at every layout, another one as soon as a bit differs. Collective over the model's ranks.

    It is a hash of each tensor's sum of bits, so it tells accidents, not forgeries.
    """
    tensors = named_tensors(model)
    sums = torch.stack([_bits(tensor) for tensor in tensors.values()])
    cut = torch.tensor([partition_dim(tensor) is not None for tensor in tensors.values()])
    group = parallel_state.get_tensor_model_parallel_group()
    total = sums.clone()
    dist.all_reduce(total, group=group)
    found = torch.where(cut.to(sums.device), total, sums).tolist()
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    stages: list[dict[str, int]] = [{} for _ in range(pipeline.size())]
    dist.all_gather_object(stages, dict(zip(tensors, found, strict=True)), group=pipeline)
    whole = {name: value for stage in stages for name, value in stage.items()}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(BITS[tensor.element_size()]).sum(dtype=torch.int64)
