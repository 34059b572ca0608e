"""The weights that one modality has in a layer, and its way into attention and out of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from soar_mega.kernels.qk_norm_rope import Projected
from soar_mega.models.common.groups import tensor_parallel_group
from soar_mega.models.common.linear import add_bias, keeps_input
from soar_mega.models.common.modulation import Modulation
from soar_mega.models.common.open_sum import OpenSum, Tokens
from soar_mega.models.common.recompute import free_until_backward
from soar_mega.models.common.sequence_shards import attention_config, heads_to_tokens, pad, tokens_to_heads


@dataclass
class LayerSubmodules:
    """What a backend provides for a layer, and which of its results are computed again in backward."""

    linear_qkv: type
    linear_proj: type
    core_attention: type
    mlp: ModuleSpec
    adaln: Callable[..., tuple[Tensor, Tensor]]  # soar_mega.kernels.adaln, or the same by plain torch calls
    gated_add: Callable[..., Tensor]
    qk_norm_rope: Callable[..., tuple[Tensor, Tensor, Tensor]]
    makes_norms_again: bool
    makes_qk_again: bool


class NormWeight(torch.nn.Module):
    """The weight [D] of an RMSNorm over heads; the norm itself is computed for queries and keys at once.

    It is a module, and called, because megatron waits for gathered parameters before a module's forward.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(config.kv_channels, dtype=config.params_dtype))

    def forward(self) -> Tensor:
        return self.weight


class AttentionProjections(torch.nn.Module):
    """A stream's way into attention and out of it: fused qkv (rows ordered head, q/k/v, D), QK norms, projection."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LayerSubmodules,
        has_output: bool = True,
        has_output_bias: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        common = {
            "config": config,
            "init_method": config.init_method,
            "skip_bias_add": True,  # a frozen weight would otherwise take its bias's gradient along
            "is_expert": False,
            "tp_group": tensor_parallel_group(),
        }
        width = config.kv_channels * config.num_attention_heads
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            3 * width,
            bias=True,
            gather_output=False,
            tp_comm_buffer_name="qkv",
            **common,
        )
        self.linear_proj = None
        if has_output:
            self.linear_proj = build_module(
                submodules.linear_proj,
                width,
                config.hidden_size,
                bias=has_output_bias,
                input_is_parallel=True,
                tp_comm_buffer_name="proj",
                **common,
            )
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm:
            # These names make megatron add up the heads' partial gradients over TP.
            self.q_layernorm, self.k_layernorm = NormWeight(config), NormWeight(config)

    def qkv(self, hidden: Tensor, length: int) -> Projected:
        """This rank's tokens [S, B, H] -> q, k and v of all tokens and its heads, of which attention sees `length`."""
        # under sequence parallelism the linear gathers over TP
        mixed, bias = self.linear_qkv(hidden)
        if self.config.context_parallel_size > 1:
            mixed, bias = tokens_to_heads(add_bias(mixed, bias), self.config), None
        if self.q_layernorm is None or self.k_layernorm is None:
            return Projected(mixed, length, bias)
        return Projected(mixed, length, bias, self.q_layernorm(), self.k_layernorm())

    def project(self, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """Context [length, B, local heads x D] -> this rank's tokens [S, B, H] and the bias that is left to add."""
        assert self.linear_proj is not None
        context = heads_to_tokens(pad(context, self.config), self.config)
        return self.linear_proj(context)


def build_attention(
    config: TransformerConfig, submodules: LayerSubmodules, layer_number: int
) -> torch.nn.Module:
    """The backend's attention of a layer, without a mask."""
    return build_module(
        submodules.core_attention,
        config=attention_config(config),
        layer_number=layer_number + 1,
        attn_mask_type=AttnMaskType.no_mask,
        attention_type="self",
    )


def attend(
    attention: torch.nn.Module, make: Callable[..., tuple[Tensor, Tensor, Tensor]], makes_again: bool
) -> Tensor:
    """Attention of the queries, keys and values [S, B, local heads, D] that `make` makes -> [S, B, local heads x D].

    makes_again: they are not kept for the backward.
    """
    query, key, value = make()
    context = attention(query, key, value, attention_mask=None, attn_mask_type=AttnMaskType.no_mask)
    if makes_again:
        free_until_backward((query, key, value), make, context)
    return context


def build_mlp(config: TransformerConfig, submodules: LayerSubmodules) -> MLP:
    """The backend's MLP of a stream."""
    return build_module(
        submodules.mlp,
        config=config,
        ffn_hidden_size=config.ffn_hidden_size,
        tp_group=tensor_parallel_group(),
    )


class Stream(torch.nn.Module):
    """The weights of one modality in a layer. Before the model's end the text needs no more than its q, k and v.

    Attributes:
        leaves_sum_open: whether the layer's last sum is left to the next layer.
    """

    leaves_sum_open = False

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LayerSubmodules,
        is_dual: bool = False,
        is_pre_only: bool = False,
    ) -> None:
        super().__init__()
        self.modulation = Modulation(config, 2 if is_pre_only else 9 if is_dual else 6)
        self.attention = AttentionProjections(config, submodules, has_output=not is_pre_only)
        self.dual_attention = AttentionProjections(config, submodules) if is_dual else None
        self.mlp = None if is_pre_only else build_mlp(config, submodules)
        self.adaln, self.gated_add = submodules.adaln, submodules.gated_add
        self.makes_norms_again = submodules.makes_norms_again

    def qkv(
        self, attention: AttentionProjections, tokens: Tokens, shift: Tensor, scale: Tensor, length: int
    ) -> tuple[Tensor, Projected]:
        """A layer's tokens [S, B, H], their sum closed, and the way of what is modulated of them into attention."""
        residual, *branch = tokens if isinstance(tokens, OpenSum) else (tokens,)
        hidden, modulated = self.adaln(residual, shift, scale, *branch)
        projected = attention.qkv(modulated, length)
        if self.makes_norms_again and keeps_input(attention.linear_qkv):
            free_until_backward(modulated, partial(self.adaln, hidden, shift, scale), projected.mixed)
        return hidden, projected

    def add_mlp(
        self,
        hidden: Tensor,
        attended: tuple[Tensor, Tensor | None],
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        mlp_gate: Tensor,
    ) -> Tokens:
        """hidden [S, B, H] plus gated attention, plus the gated MLP of their modulated sum.

        attended: what attention's projection returned, and the bias that is left to add to it.
        """
        assert self.mlp is not None
        branch, bias = attended
        hidden, modulated = self.adaln(hidden, shift, scale, branch, gate, bias)
        branch, bias = self.mlp(modulated)
        if self.makes_norms_again and keeps_input(self.mlp.linear_fc1):
            free_until_backward(modulated, partial(self.adaln, hidden, shift, scale), branch)
        if self.leaves_sum_open:
            return OpenSum(hidden, branch, mlp_gate, bias)
        return self.gated_add(hidden, branch, mlp_gate, bias)
