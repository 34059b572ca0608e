"""Dao's flash-attn behind the interface of megatron's core attention modules."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from soar_mega import layer_checks


class FlashAttention(torch.nn.Module):
    """flash-attn 3 on Hopper where it is installed, else flash-attn 2.

    The context lies as the queries do, so that neither what is before it nor the linear behind it makes a copy. Its
    gradients are added up in any order unless torch.use_deterministic_algorithms has been called.

    Raises:
        ValueError: flash-attn 3 was compiled without heads of this size.
    """

    def __init__(self, config: TransformerConfig, **kwargs: object) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self.attention = _load(config.kv_channels)

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
        return context.transpose(0, 1).flatten(2)


class _FlashAttention3(torch.autograd.Function):
    """Its operators themselves: its flash_attn_func makes an output with the samples outermost."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        context = torch.empty_like(query)  # with its strides
        scale = query.shape[-1] ** -0.5
        _, sums, *_ = torch.ops.flash_attn_3.fwd(
            query, key, value, out=context, softmax_scale=scale, num_splits=1
        )
        ctx.save_for_backward(query, key, value, context, sums)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, context, sums = ctx.saved_tensors
        gradients = {f"d{name}": torch.empty_like(x) for name, x in zip("qkv", (query, key, value))}
        torch.ops.flash_attn_3.bwd(
            gradient if gradient.stride(-1) == 1 else gradient.contiguous(),
            query, key, value, context, sums, **gradients,
            softmax_scale=query.shape[-1] ** -0.5,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return tuple(gradients.values())


def _flash_attention_2(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(query, key, value, deterministic=torch.are_deterministic_algorithms_enabled())


def _load(head_size: int) -> Callable[..., Tensor]:
    capability = layer_checks.gpu_capability()
    assert capability is not None
    if layer_checks.flash_version(capability) == 2:
        return _flash_attention_2
    sizes = layer_checks.flash_3_head_sizes()
    if head_size > max(sizes):
        raise ValueError(
            f"model.attention_backend=flash: flash-attn 3 was compiled here for heads of up to {max(sizes)}, and this "
            f"model's have {head_size}: compile it with larger ones, or set model.attention_backend=sdpa"
        )
    importlib.import_module(layer_checks.FLASH_3_OPERATORS)
    return _FlashAttention3.apply
