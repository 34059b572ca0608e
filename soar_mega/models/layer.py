"""One MMDiT layer: text and image with their own weights, meeting in one attention (SD3, arXiv 2403.03206)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from soar_mega.models.groups import tensor_parallel_group
from soar_mega.models.layout import padded_length
from soar_mega.models.linear import add_bias
from soar_mega.models.modulation import (
    EPSILON,
    Modulation,
    layer_norm,
    modulate,
    without_sequence_parallel,
)


@dataclass
class MMDiTLayerSubmodules:
    """What a backend provides for a layer."""

    linear_qkv: type
    linear_proj: type
    q_layernorm: type
    k_layernorm: type
    core_attention: type
    mlp: ModuleSpec


class Lengths(NamedTuple):
    """Tokens of each stream without padding."""

    text: int
    image: int


class AttentionProjections(torch.nn.Module):
    """A stream's way into attention and out of it: fused qkv (rows ordered head, q/k/v, D), QK norms, projection."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MMDiTLayerSubmodules,
        layer_number: int,
        has_output: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        common = {
            "config": config,
            "init_method": config.init_method,
            "bias": True,
            "skip_bias_add": True,  # a frozen weight would otherwise take its bias's gradient along
            "is_expert": False,
            "tp_group": tensor_parallel_group(),
        }
        width = config.kv_channels * config.num_attention_heads
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            3 * width,
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
                input_is_parallel=True,
                tp_comm_buffer_name="proj",
                **common,
            )
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm:
            # These names make megatron add up the heads' partial gradients over TP. The norms see whole sequences.
            norm = {
                "config": without_sequence_parallel(config),
                "hidden_size": config.kv_channels,
                "eps": EPSILON,
            }
            self.q_layernorm = build_module(submodules.q_layernorm, **norm).to(config.params_dtype)
            self.k_layernorm = build_module(submodules.k_layernorm, **norm).to(config.params_dtype)

    def qkv(self, hidden: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden [S, B, H] (a shard, under sequence parallelism) -> q, k, v [length, B, local heads, D]."""
        mixed = add_bias(*self.linear_qkv(hidden))
        if self.config.sequence_parallel:
            mixed = mixed[:length]  # the linear has gathered the stream: its padding ends here
        heads = mixed.shape[-1] // (3 * self.config.kv_channels)
        query, key, value = mixed.unflatten(-1, (heads, 3, self.config.kv_channels)).unbind(3)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value

    def project(self, context: Tensor) -> Tensor:
        """Context [length, B, local heads x D] -> [S, B, H] (a shard, under sequence parallelism)."""
        assert self.linear_proj is not None
        if self.config.sequence_parallel:
            missing = padded_length(len(context), self.config.tensor_model_parallel_size) - len(context)
            context = F.pad(context, (0, 0, 0, 0, 0, missing))
        return add_bias(*self.linear_proj(context))


class Stream(torch.nn.Module):
    """The weights of one modality in a layer. Before the model's end the text needs no more than its q, k and v."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MMDiTLayerSubmodules,
        layer_number: int,
        is_dual: bool = False,
        is_pre_only: bool = False,
    ) -> None:
        super().__init__()
        self.modulation = Modulation(config, 2 if is_pre_only else 9 if is_dual else 6)
        self.attention = AttentionProjections(config, submodules, layer_number, has_output=not is_pre_only)
        self.dual_attention = AttentionProjections(config, submodules, layer_number) if is_dual else None
        self.mlp: MLP | None = None
        if not is_pre_only:
            self.mlp = build_module(
                submodules.mlp,
                config=config,
                ffn_hidden_size=config.ffn_hidden_size,
                tp_group=tensor_parallel_group(),
            )

    def add_mlp(self, hidden: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """hidden [S, B, H] plus its gated, modulated MLP."""
        assert self.mlp is not None
        output = add_bias(*self.mlp(modulate(layer_norm(hidden), shift, scale)))
        return torch.addcmul(hidden, gate, output)


class MMDiTLayer(torch.nn.Module):
    """Text and image through one joint attention, optionally a second attention of the image alone, and two MLPs.

    Args:
        is_dual: has the second, image-only attention.
        is_last: ends the model; its text comes out of no layer, so nothing is computed for it after attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MMDiTLayerSubmodules,
        layer_number: int,
        is_dual: bool,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.image = Stream(config, submodules, layer_number, is_dual=is_dual)
        self.text = Stream(config, submodules, layer_number, is_pre_only=is_last)
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number + 1,
            attn_mask_type=AttnMaskType.no_mask,
            attention_type="self",
        )
        self.is_last = is_last

    def forward(
        self, text: Tensor, image: Tensor, conditioning: Tensor, lengths: Lengths
    ) -> tuple[Tensor | None, Tensor]:
        """Text [S_text, B, H], image [S_image, B, H], conditioning [B, H] -> text (None after the last), image."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *dual = self.image.modulation(conditioning)
        normed = layer_norm(image)
        if self.is_last:
            text_scale, text_shift = self.text.modulation(conditioning)
        else:
            text_shift, text_scale, text_gate, *text_mlp = self.text.modulation(conditioning)
        image_qkv = self.image.attention.qkv(modulate(normed, shift, scale), lengths.image)
        text_qkv = self.text.attention.qkv(modulate(layer_norm(text), text_shift, text_scale), lengths.text)
        # Queries of the last layer's text are computed too: every parameter must get a gradient, if only zeros.
        joint = self._attend(*(torch.cat(pair) for pair in zip(image_qkv, text_qkv)))
        image_context, text_context = joint.split([lengths.image, lengths.text])

        image = torch.addcmul(image, gate, self.image.attention.project(image_context))
        if self.image.dual_attention is not None:
            shift, scale, gate = dual
            context_dual = self._attend(
                *self.image.dual_attention.qkv(modulate(normed, shift, scale), lengths.image)
            )
            image = torch.addcmul(image, gate, self.image.dual_attention.project(context_dual))
        image = self.image.add_mlp(image, mlp_shift, mlp_scale, mlp_gate)
        if self.is_last:
            return None, image
        text = torch.addcmul(text, text_gate, self.text.attention.project(text_context))
        return self.text.add_mlp(text, *text_mlp), image

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.core_attention(
            query, key, value, attention_mask=None, attn_mask_type=AttnMaskType.no_mask
        )
