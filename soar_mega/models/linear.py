"""megatron's parallel linears, which on one tensor-parallel rank are plain ones.

A plain linear adds its bias inside the matrix product; megatron's adds it in a pass of its own, which costs small
models a tenth of their time.
"""

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import get_pg_size
from torch import Tensor

# with skip_bias_add the bias is left to the caller, unless it is in already
Output = tuple[Tensor, Tensor | None]


class ColumnLinear(ColumnParallelLinear):
    """Output features are cut over TP."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Output:
        """[..., in] -> [..., out / TP] and what is left to add."""
        if get_pg_size(self.tp_group) > 1:
            return super().forward(input_, *args, **kwargs)
        return F.linear(input_, self.weight, self.bias), None


class RowLinear(RowParallelLinear):
    """Input features are cut over TP."""

    def forward(self, input_: Tensor) -> Output:
        """[..., in / TP] -> [..., out] and what is left to add."""
        if get_pg_size(self.tp_group) > 1:
            return super().forward(input_)
        return F.linear(input_, self.weight, self.bias), None


def add_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    """Complete the output of a linear that was built with skip_bias_add."""
    return output if bias is None else output + bias
