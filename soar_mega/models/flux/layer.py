"""FLUX's layers: double ones, where text and image have weights of their own, and single ones, where they share them.

Both take the two streams and return the two, this rank's tokens of each, so that a pipeline may be cut anywhere.
"""

from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from soar_mega.kernels.qk_norm_rope import Projected
from soar_mega.models.common.lengths import Lengths
from soar_mega.models.common.linear import keeps_input
from soar_mega.models.common.modulation import Modulation
from soar_mega.models.common.open_sum import Tokens
from soar_mega.models.common.recompute import free_until_backward
from soar_mega.models.common.sequence_shards import sequence_shards
from soar_mega.models.common.stream import (
    AttentionProjections,
    LayerSubmodules,
    Stream,
    attend,
    build_attention,
    build_mlp,
)
from soar_mega.models.flux.joined import join
from soar_mega.models.flux.rope import rotation


class RotaryAttention(torch.nn.Module):
    """Attention of text and image together, queries and keys turned by their places."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LayerSubmodules,
        layer_number: int,
        axes: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.core_attention = build_attention(config, submodules, layer_number)
        self.qk_norm_rope, self.makes_qk_again = submodules.qk_norm_rope, submodules.makes_qk_again
        self.head_size = config.kv_channels
        self.axes = axes

    def forward(self, streams: list[Projected], lengths: Lengths, order: tuple[range, ...]) -> Tensor:
        """-> [text + image, B, local heads x D], its tokens in the order of those of the streams together."""
        tables = rotation(self.axes, lengths.text, lengths.grid, order, streams[0].mixed.device)
        make = partial(self.qk_norm_rope, streams, self.head_size, *tables)
        return attend(self.core_attention, make, self.makes_qk_again)


class DoubleLayer(torch.nn.Module):
    """Text and image through one attention and an MLP each."""

    takes_open_sums = True

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LayerSubmodules,
        layer_number: int,
        axes: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.image = Stream(config, submodules)
        self.text = Stream(config, submodules)
        self.joint_attention = RotaryAttention(config, submodules, layer_number, axes)

    def forward(
        self, text: Tokens, image: Tokens, conditioning: Tensor, lengths: Lengths
    ) -> tuple[Tokens, Tokens]:
        """Text [S_text, B, H], image [S_image, B, H], conditioning [B, H] -> text, image."""
        text_shift, text_scale, text_gate, *text_mlp = self.text.modulation(conditioning)
        shift, scale, gate, *mlp = self.image.modulation(conditioning)
        text, text_qkv = self.text.qkv(self.text.attention, text, text_shift, text_scale, lengths.text)
        image, image_qkv = self.image.qkv(self.image.attention, image, shift, scale, lengths.image)
        order = range(lengths.text), range(lengths.text, lengths.text + lengths.image)
        context = self.joint_attention([text_qkv, image_qkv], lengths, order)
        text_context, image_context = context.split([lengths.text, lengths.image])
        text = self.text.add_mlp(text, self.text.attention.project(text_context), text_gate, *text_mlp)
        return text, self.image.add_mlp(image, self.image.attention.project(image_context), gate, *mlp)


class SingleLayer(torch.nn.Module):
    """Text and image as one stream, through attention and MLP side by side.

    What diffusers keeps as one `proj_out` of the two branches is attention's projection, which has no bias here, and
    the MLP's second linear: each is cut over TP by its own columns.
    """

    takes_open_sums = False  # the streams would be joined twice

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LayerSubmodules,
        layer_number: int,
        axes: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.config = config
        self.modulation = Modulation(config, 3)
        self.attention = AttentionProjections(config, submodules, has_output_bias=False)
        self.joint_attention = RotaryAttention(config, submodules, layer_number, axes)
        self.mlp = build_mlp(config, submodules)
        self.adaln, self.gated_add = submodules.adaln, submodules.gated_add
        self.makes_norms_again = submodules.makes_norms_again

    def forward(
        self, text: Tensor, image: Tensor, conditioning: Tensor, lengths: Lengths
    ) -> tuple[Tensor, Tensor]:
        """Text [S_text, B, H], image [S_image, B, H], conditioning [B, H] -> text, image."""
        parts = [len(text), len(image)]
        joined = join(lengths.text, lengths.image, *parts, sequence_shards(self.config))
        shift, scale, gate = self.modulation(conditioning)
        hidden, modulated = self.adaln(torch.cat([text, image]), shift, scale)
        qkv = self.attention.qkv(modulated, lengths.text + lengths.image)
        context = self.joint_attention(joined.cut(qkv), lengths, joined.order)
        attended, _ = self.attention.project(joined.put_back(context))
        branch, bias = self.mlp(modulated)
        if self.makes_norms_again and any(map(keeps_input, (self.attention.linear_qkv, self.mlp.linear_fc1))):
            free_until_backward(modulated, partial(self.adaln, hidden, shift, scale), qkv.mixed, branch)
        text, image = self.gated_add(hidden, attended + branch, gate, bias).split(parts)
        return text, image
