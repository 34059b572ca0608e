"""Dao's flash-attn behind the interface of megatron's core attention modules."""

from collections.abc import Callable

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from soar_mega import layer_checks


class FlashAttention(torch.nn.Module):
    """flash-attn 3 on Hopper where it is installed, else flash-attn 2."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.attention = _load()

    def forward(
        self,
        query: Tensor,  # [S, B, heads, D]
        key: Tensor,  # [S, B, heads, D]
        value: Tensor,  # [S, B, heads, D]
        attention_mask: None = None,
        attn_mask_type: AttnMaskType = AttnMaskType.no_mask,
    ) -> Tensor:
        """Attention without a mask -> [S, B, heads x D]."""
        assert attention_mask is None and attn_mask_type == AttnMaskType.no_mask
        # [S, B, heads, D] -> [B, S, heads, D]
        context = self.attention(*(x.transpose(0, 1) for x in (query, key, value)))
        if isinstance(context, tuple):  # early versions of flash-attn 3 give the softmax's sums too
            context = context[0]
        return context.transpose(0, 1).flatten(2)


def _load() -> Callable[..., Tensor | tuple[Tensor, ...]]:
    capability = layer_checks.gpu_capability()
    assert capability is not None
    if layer_checks.flash_version(capability) == 2:
        from flash_attn import flash_attn_func

        return flash_attn_func
    try:
        from flash_attn_interface import flash_attn_func as flash_attn_3_func
    except ImportError:
        from flash_attn_3.flash_attn_interface import flash_attn_func as flash_attn_3_func
    return flash_attn_3_func
