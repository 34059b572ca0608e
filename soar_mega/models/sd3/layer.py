"""One layer: text and image with their own weights, meeting in one attention (SD3, arXiv 2403.03206)."""

from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from soar_mega.kernels.qk_norm_rope import Projected
from soar_mega.models.common.lengths import Lengths
from soar_mega.models.common.open_sum import Tokens
from soar_mega.models.common.stream import LayerSubmodules, Stream, attend, build_attention


class MMDiTLayer(torch.nn.Module):
    """Text and image through one joint attention, optionally a second attention of the image alone, and two MLPs.

    Args:
        is_dual: has the second, image-only attention.
        is_last: ends the model; its text comes out of no layer, so nothing is computed for it after attention.
    """

    takes_open_sums = True

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LayerSubmodules,
        layer_number: int,
        is_dual: bool,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.image = Stream(config, submodules, is_dual=is_dual)
        self.text = Stream(config, submodules, is_pre_only=is_last)
        self.core_attention = build_attention(config, submodules, layer_number)
        self.qk_norm_rope, self.makes_qk_again = submodules.qk_norm_rope, submodules.makes_qk_again
        self.head_size = config.kv_channels
        self.is_last = is_last

    def forward(
        self, text: Tokens, image: Tokens, conditioning: Tensor, lengths: Lengths
    ) -> tuple[Tokens | None, Tokens]:
        """Text [S_text, B, H], image [S_image, B, H], conditioning [B, H] -> text (None after the last), image."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *dual = self.image.modulation(conditioning)
        if self.is_last:
            text_scale, text_shift = self.text.modulation(conditioning)
        else:
            text_shift, text_scale, text_gate, *text_mlp = self.text.modulation(conditioning)
        image, image_qkv = self.image.qkv(self.image.attention, image, shift, scale, lengths.image)
        text, text_qkv = self.text.qkv(self.text.attention, text, text_shift, text_scale, lengths.text)
        # Queries of the last layer's text are computed too: every parameter must get a gradient, if only zeros.
        joint = self._attend(image_qkv, text_qkv)
        image_context, text_context = joint.split([lengths.image, lengths.text])

        attended = self.image.attention.project(image_context)
        if (attention := self.image.dual_attention) is not None:
            dual_shift, dual_scale, dual_gate = dual
            image, dual_qkv = self.image.qkv(attention, image, dual_shift, dual_scale, lengths.image)
            context_dual = self._attend(dual_qkv)
            branch, bias = attended
            image = self.image.gated_add(image, branch, gate, bias)
            attended, gate = attention.project(context_dual), dual_gate
        image = self.image.add_mlp(image, attended, gate, mlp_shift, mlp_scale, mlp_gate)
        if self.is_last:
            return None, image
        return self.text.add_mlp(text, self.text.attention.project(text_context), text_gate, *text_mlp), image

    def _attend(self, *streams: Projected) -> Tensor:
        make = partial(self.qk_norm_rope, streams, self.head_size)
        return attend(self.core_attention, make, self.makes_qk_again)
