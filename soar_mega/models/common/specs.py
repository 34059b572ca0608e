"""What layers are made of, over megatron's backends."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from soar_mega.config import ModelConfig
from soar_mega.kernels.adaln import adaln, plain_adaln
from soar_mega.kernels.bias_gelu import bias_gelu, plain_bias_gelu
from soar_mega.kernels.gated_add import gated_add, plain_gated_add
from soar_mega.kernels.qk_norm_rope import plain_qk_norm_rope, qk_norm_rope
from soar_mega.layer_checks import check_layers, check_machine
from soar_mega.models.common.answering import is_answering
from soar_mega.models.common.feed_forward import FeedForward
from soar_mega.models.common.flash_attention import FlashAttention
from soar_mega.models.common.linear import (
    ColumnLinear,
    ColumnLinearBeforeKernel,
    RowLinear,
    RowLinearBeforeKernel,
)
from soar_mega.models.common.recompute import recomputed
from soar_mega.models.common.stream import LayerSubmodules
from soar_mega.models.common.te_layers import get_te_provider

# in the order in which torch tries them
LEARNING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ANSWERING = [SDPBackend.CUDNN_ATTENTION, *LEARNING]


class ScaledDotProductAttention(torch.nn.Module):
    """torch's fused attention behind the interface of megatron's core attention modules."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__()

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
        # [S, B, heads, D] -> [B, heads, S, D]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with attentions(query.device):
            context = F.scaled_dot_product_attention(query, key, value)
        return context.permute(2, 0, 1, 3).flatten(2)


def attentions(device: torch.device) -> AbstractContextManager[None]:
    """On a GPU, which of its attentions torch chooses from.

    At an SD3.5 layer's shape on an H100 cuDNN's takes 0.21 ms forward and 0.80 ms with its backward, flash attention
    0.30 and 1.27 ms. But cuDNN's backward fails in a CUDA graph (torch 2.11, CUDA 13.0): gradients that are not
    numbers, or an illegal address.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(ANSWERING if is_answering() else LEARNING, set_priority=True)


# by model.attention_backend; the others are Transformer Engine's
ATTENTIONS: dict[str, type] = {"sdpa": ScaledDotProductAttention, "flash": FlashAttention}


class LocalLayers(LocalSpecProvider):
    """megatron's own layers with an attention that does not keep every score, as the local one does."""

    def __init__(self, attention: type) -> None:
        self.attention = attention

    def column_parallel_linear(self) -> type:
        """Which column parallel linear module the backend uses."""
        return ColumnLinear

    def row_parallel_linear(self) -> type:
        """Which row parallel linear module the backend uses."""
        return RowLinear

    def core_attention(self) -> type:
        """Which module to use for attention."""
        return self.attention


def get_provider(model: ModelConfig) -> BackendSpecProvider:
    """The provider behind model.transformer_impl and model.attention_backend.

    Raises:
        ValueError: settings that do not fit each other, or that this machine cannot run.
    """
    check_layers(model)
    check_machine(model)
    if model.transformer_impl == "transformer_engine":
        return get_te_provider(model.attention_backend, ATTENTIONS.get(model.attention_backend))
    return LocalLayers(ATTENTIONS[model.attention_backend])


def layer_submodules(
    provider: BackendSpecProvider, fused_kernels: bool = True, made_again: frozenset[str] = frozenset()
) -> LayerSubmodules:
    """What layers are made of: the provider's modules, and our kernels or plain torch calls.

    made_again: `ModelConfig.made_again`.
    """
    column, row = provider.column_parallel_linear(), provider.row_parallel_linear()
    if fused_kernels and isinstance(provider, LocalLayers):
        column, row = ColumnLinearBeforeKernel, RowLinearBeforeKernel
    attention = provider.core_attention()
    return LayerSubmodules(
        linear_qkv=column,
        linear_proj=row,
        core_attention=recomputed(attention) if "core_attn" in made_again else attention,
        mlp=ModuleSpec(
            module=FeedForward,
            params={
                "bias_gelu": bias_gelu if fused_kernels else plain_bias_gelu,
                "makes_again": "mlp_act" in made_again,
            },
            submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row),
        ),
        adaln=adaln if fused_kernels else plain_adaln,
        gated_add=gated_add if fused_kernels else plain_gated_add,
        qk_norm_rope=qk_norm_rope if fused_kernels else plain_qk_norm_rope,
        makes_norms_again="layernorm" in made_again,
        makes_qk_again="qk_layernorm" in made_again,
    )
