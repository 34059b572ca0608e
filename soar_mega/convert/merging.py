"""A transformer's weights with adapters in them, a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from soar_mega.convert.adapter_files import LoraFile, open_lora
from soar_mega.convert.checks import listed
from soar_mega.convert.safetensors_reader import open_file
from soar_mega.convert.weights import Weights

A, B = "lora_A.weight", "lora_B.weight"


def with_adapters(weights: Weights, lora: str | Path) -> Weights:
    """Weights to each of which is added what its adapter adds: alpha / rank x B A.

    Args:
        lora: adapters as `open_lora` finds them.

    Raises:
        ValueError: what `open_lora` raises, or the adapters are not of this transformer's linears; names them.
    """
    found = open_lora(lora)
    _check(weights, found)
    return Weights(weights.sizes, weights.shapes, _Merged(weights, found))


class _Merged:
    def __init__(self, weights: Weights, lora: LoraFile) -> None:
        self._weights, self._lora = weights, lora
        self._dtypes = weights.dtypes()
        self._modules = set(lora.modules)

    def dtype(self, key: str) -> torch.dtype:
        return self._dtypes[key]

    def where(self, key: str) -> str:
        return f"{key} with the adapters in {self._lora.path}"

    def blocks(self, key: str) -> Iterator[tuple[int, Tensor]]:
        module, _, kind = key.rpartition(".")
        if kind != "weight" or module not in self._modules:
            yield from self._weights.blocks(key)
            return
        with open_file(self._lora.path) as opened:
            a, b = (opened.get_tensor(self._lora.keys[f"{module}.{name}"]).float() for name in (A, B))
        scale = self._lora.alpha / self._lora.rank
        for row, block in self._weights.blocks(key):
            yield row, block.float() + scale * b[row : row + len(block)].matmul(a)


def _check(weights: Weights, lora: LoraFile) -> None:
    problems = []
    for module in lora.modules:
        shape = weights.shapes.get(f"{module}.weight", ())
        wanted = {f"{module}.{A}": (lora.rank, *shape[1:]), f"{module}.{B}": (*shape[:1], lora.rank)}
        if len(shape) != 2:
            problems.append(f"{module} is no linear of this transformer")
        else:
            problems += [
                f"{key} is {lora.shapes.get(key, 'missing')}, the weight {shape} needs {right}"
                for key, right in wanted.items()
                if lora.shapes.get(key) != right
            ]
    if problems:
        raise ValueError(f"{lora.path} does not fit the transformer:\n  {listed(problems)}")
