"""Random weights as a function of (seed, parameter name): equal at every layout."""

import hashlib

import torch
from torch import Tensor

from soar_mega.models.common.gather import full_shape, local_shard
from soar_mega.models.common.transformer import Transformer

# each layer starts as the identity, the velocity at 0
ZERO = ("modulation.linear", "norm_out.linear", "proj_out")


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Fill a transformer in DiT's way (arXiv 2212.09748): Xavier linears, small timestep MLP, zero adaLN and output."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") or name.rpartition(".")[0].endswith(ZERO):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(_draw(name, parameter, seed))
    model.fill_buffers()


def _draw(name: str, parameter: Tensor, seed: int) -> Tensor:
    shape = full_shape(parameter)
    generator = generator_of(seed, name)
    full = torch.empty(shape[0], torch.Size(shape[1:]).numel())
    if "timestep_embedder" in name:
        full.normal_(0.0, 0.02, generator=generator)
    else:
        fan_out = full.shape[0] // 3 if "linear_qkv" in name else full.shape[0]
        bound = (6.0 / (fan_out + full.shape[1])) ** 0.5
        full.uniform_(-bound, bound, generator=generator)
    return local_shard(full.view(shape), parameter)


def generator_of(seed: int, name: str) -> torch.Generator:
    """Where a parameter's random numbers come from, on the CPU."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
