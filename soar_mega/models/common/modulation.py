"""adaLN: shifts, scales and gates from the conditioning vector, once per sample."""

import copy

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from soar_mega.models.common.groups import tensor_parallel_group
from soar_mega.models.common.linear import ColumnLinear, add_bias


class Modulation(torch.nn.Module):
    """A column-parallel linear whose output, `parts` vectors of the hidden size, is complete on every rank.

    adaLN linears hold a third of all parameters, so they are sharded; they work on one vector per sample, so gathering
    their output is cheap.
    """

    def __init__(self, config: TransformerConfig, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.sequence_parallel = config.sequence_parallel
        self.tp_group = tensor_parallel_group()
        self.linear = ColumnLinear(
            config.hidden_size,
            parts * config.hidden_size,
            # with sequence parallelism on, the linear would gather the conditioning along its batch dimension
            config=without_sequence_parallel(config),
            init_method=config.init_method,
            bias=True,
            skip_bias_add=True,  # a frozen weight would otherwise take its bias's gradient along
            tp_group=self.tp_group,
        )

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """Conditioning [B, H], already through SiLU -> `parts` tensors [B, H]."""
        output = add_bias(*self.linear(conditioning))
        if self.tp_group is not None and self.tp_group.size() > 1:
            if self.sequence_parallel:
                # each rank modulates its own tokens: the gradients are partial sums and must be added up
                output = tensor_parallel.all_gather_last_dim_from_tensor_parallel_region(
                    output, self.tp_group
                )
            else:
                output = tensor_parallel.gather_from_tensor_model_parallel_region(output, self.tp_group)
        return output.chunk(self.parts, dim=-1)


def without_sequence_parallel(config: TransformerConfig) -> TransformerConfig:
    """A copy for modules that see whole sequences, or no sequence."""
    config = copy.copy(config)
    config.sequence_parallel = False
    return config
