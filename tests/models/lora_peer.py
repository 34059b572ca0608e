"""Adapters on diffusers' transformer, by hand: what PEFT does, in a few lines."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from soar_mega.config import LoraConfig
from soar_mega.models.common.lora import Pair, scale


class AdaptedPeer(Module):
    """W x + alpha / rank B A x around one of diffusers' linears."""

    def __init__(self, base: Linear, down: Tensor, up: Tensor, factor: float) -> None:
        super().__init__()
        self.base, self.factor = base, factor
        self.down, self.up = Parameter(down.clone()), Parameter(up.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.factor * (x @ self.down.T @ self.up.T)


def random_factors(pairs: list[Pair], rank: int) -> dict[str, Tensor]:
    """A and B of each pair under PEFT's names, none of them at a special value."""
    generator = torch.Generator().manual_seed(3)
    return {
        entry.keys[0]: 0.3 * torch.randn(entry.shape, generator=generator)
        for pair in pairs
        for entry in pair.entries(rank)
    }


def adapt_peer(peer: Any, pairs: list[Pair], factors: dict[str, Tensor], config: LoraConfig) -> None:
    """Put adapters on the peer's linears."""
    for pair in pairs:
        parent, _, name = pair.module.rpartition(".")
        base = peer.get_submodule(pair.module)
        down, up = (factors[f"{pair.module}.lora_{which}.weight"] for which in "AB")
        setattr(peer.get_submodule(parent), name, AdaptedPeer(base, down, up, scale(config)))


def peer_gradients(peer: Any, pairs: list[Pair]) -> dict[str, Tensor]:
    """Of A and B, under PEFT's names."""
    found = {}
    for pair in pairs:
        adapted = peer.get_submodule(pair.module)
        found[f"{pair.module}.lora_A.weight"] = adapted.down.grad
        found[f"{pair.module}.lora_B.weight"] = adapted.up.grad
    return found
