"""megatron's MLP, with the bias of its first linear and the GELU behind it as one operation."""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from soar_mega.models.common.linear import keeps_input
from soar_mega.models.common.recompute import free_until_backward


class FeedForward(MLP):
    """Two linears, and between them `bias_gelu` (soar_mega.kernels.bias_gelu, or the same by plain torch calls).

    makes_again: what is between them is computed again in backward.
    """

    def __init__(
        self, *args: Any, bias_gelu: Callable[..., Tensor], makes_again: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.bias_gelu, self.makes_again = bias_gelu, makes_again

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] -> [S, B, H] and the bias that is left to add."""
        make = partial(self.bias_gelu, *self.linear_fc1(hidden))
        activated = make()
        output, bias = self.linear_fc2(activated)
        if self.makes_again and keeps_input(self.linear_fc2):
            free_until_backward(activated, make, output)
        return output, bias
