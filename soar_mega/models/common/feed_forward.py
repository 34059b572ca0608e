"""megatron's MLP, with the bias of its first linear and the GELU behind it as one operation."""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor


class FeedForward(MLP):
    """Two linears, and between them `bias_gelu` (soar_mega.kernels.bias_gelu, or the same by plain torch calls)."""

    def __init__(
        self, *args: Any, bias_gelu: Callable[[Tensor, Tensor | None], Tensor], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.bias_gelu = bias_gelu

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] -> [S, B, H] and the bias that is left to add."""
        return self.linear_fc2(self.bias_gelu(*self.linear_fc1(hidden)))
