"""The part of a model that one rank holds: one chunk, or several with an interleaved pipeline."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.models.common.build import build_model
from soar_mega.models.common.pipeline_layout import chunks_per_rank
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.common.transformer import Transformer


class ModelChunks(torch.nn.Module):
    """The model chunks of this rank as one module, whose tensors have their global names."""

    def __init__(self, chunks: list[Transformer]) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)
        self.sizes, self.config = chunks[0].sizes, chunks[0].config

    def forward(self, *inputs: Any, **settings: Any) -> Tensor:
        """The velocity, where one chunk is the whole model."""
        [chunk] = self.chunks
        return chunk(*inputs, **settings)

    def parts(self) -> list[Transformer]:
        """The chunks."""
        return [chunk for chunk in self.chunks if isinstance(chunk, Transformer)]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Parameter]]:
        """This rank's parameters under their global names."""
        for chunk in self.chunks:
            yield from chunk.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """This rank's buffers under their global names."""
        for chunk in self.chunks:
            yield from chunk.named_buffers(*args, **kwargs)

    def weights_changed(self) -> None:
        """Have FP8 forms of the weights made anew at their next use."""
        for chunk in self.chunks:
            assert isinstance(chunk, Transformer)
            chunk.weights_changed()

    def sharded_state_dict(self, metadata: dict | None = None) -> dict[str, Any]:
        """Sharded tensors for dist_checkpointing. Names and full shapes do not depend on the layout."""
        merged: dict[str, Any] = {}
        for chunk in self.chunks:
            assert isinstance(chunk, Transformer)
            merged |= chunk.sharded_state_dict(metadata=metadata)
        return merged


def build_chunks(config: Sizes, model: ModelConfig, parallel: ParallelConfig, seed: int = 0) -> ModelChunks:
    """All of a model that belongs to this rank.

    Raises:
        ValueError: a layout, a kind of layers or a precision that is not possible.
    """
    return ModelChunks(
        [
            build_model(config, model, parallel, chunk=chunk, seed=seed)
            for chunk in range(chunks_per_rank(parallel))
        ]
    )
