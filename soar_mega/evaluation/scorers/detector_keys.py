"""Names of mmdetection's Mask2Former with a Swin backbone (2.x) to those of transformers' published Mask2Former.

    backbone.patch_embed.projection, norm       encoder.embeddings.patch_embeddings.projection, norm
    backbone.stages.S.blocks.B                  encoder.encoder.layers.S.blocks.B
        norm1, norm2                                layernorm_before, layernorm_after
        attn.w_msa.relative_position_bias_table     attention.self.relative_position_bias_table
        attn.w_msa.qkv                              attention.self.{query,key,value}, a third of the rows each
        attn.w_msa.proj                             attention.output.dense
        ffn.layers.0.0, ffn.layers.1                intermediate.dense, output.dense
    backbone.stages.S.downsample                encoder.encoder.layers.S.downsample, see `_in_merge_order`
    backbone.normS                              encoder.hidden_states_norms.stage(S + 1)
    panoptic_head.pixel_decoder                 decoder
        input_convs.I.conv, gn                      input_projections.I.0, 1
        encoder.layers.L.attentions.0               encoder.layers.L.self_attn
        encoder.layers.L.norms.0, 1                 encoder.layers.L.self_attn_layer_norm, final_layer_norm
        encoder.layers.L.ffns.0.layers.0.0, 1       encoder.layers.L.fc1, fc2
        level_encoding.weight, mask_feature         level_embed, mask_projection
        lateral_convs.0.conv, gn                    adapter_1.0, 1
        output_convs.0.conv, gn                     layer_1.0, 1
    panoptic_head.transformer_decoder           transformer_module.decoder
        layers.L.attentions.0.attn, 1.attn          layers.L.cross_attn, self_attn with {q,k,v}_proj
        layers.L.norms.0, 1, 2                      layers.L.{cross_attn,self_attn,final}_layer_norm
        layers.L.ffns.0.layers.0.0, 1               layers.L.fc1, fc2
        post_norm                                   layernorm
    panoptic_head.query_embed, query_feat       transformer_module.queries_embedder, queries_features
    panoptic_head.level_embed, cls_embed        transformer_module.level_embed, class_predictor
    panoptic_head.mask_embed.0, 2, 4            transformer_module.decoder.mask_predictor.mask_embedder.0.0, 1.0, 2.0

"encoder" and "decoder" alone stand in model.pixel_level_module, transformer_module in model.
"""

import re
from collections.abc import Mapping

from torch import Tensor

PIXELS = "model.pixel_level_module"
QUERIES = "model.transformer_module"
FEED_FORWARD = {"ffns.0.layers.0.0": "fc1", "ffns.0.layers.1": "fc2"}

# Beginnings of their names, of ours, and what stands behind them.
PARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        r"backbone\.",
        f"{PIXELS}.encoder.",
        {
            "patch_embed.projection": "embeddings.patch_embeddings.projection",
            "patch_embed.norm": "embeddings.norm",
            **{f"norm{stage}": f"hidden_states_norms.stage{stage + 1}" for stage in range(4)},
        },
    ),
    (r"backbone\.stages\.(\d+)\.", rf"{PIXELS}.encoder.encoder.layers.\1.", {"downsample": "downsample"}),
    (
        r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.",
        rf"{PIXELS}.encoder.encoder.layers.\1.blocks.\2.",
        {
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "attn.w_msa.proj": "attention.output.dense",
            "attn.w_msa": "attention.self",
            "ffn.layers.0.0": "intermediate.dense",
            "ffn.layers.1": "output.dense",
        },
    ),
    (
        r"panoptic_head\.pixel_decoder\.",
        f"{PIXELS}.decoder.",
        {
            "level_encoding.weight": "level_embed",
            "mask_feature": "mask_projection",
            "lateral_convs.0.conv": "adapter_1.0",
            "lateral_convs.0.gn": "adapter_1.1",
            "output_convs.0.conv": "layer_1.0",
            "output_convs.0.gn": "layer_1.1",
        },
    ),
    (
        r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.",
        rf"{PIXELS}.decoder.input_projections.\1.",
        {"conv": "0", "gn": "1"},
    ),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.",
        rf"{PIXELS}.decoder.encoder.layers.\1.",
        {
            "attentions.0": "self_attn",
            "norms.0": "self_attn_layer_norm",
            "norms.1": "final_layer_norm",
            **FEED_FORWARD,
        },
    ),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.",
        rf"{QUERIES}.decoder.layers.\1.",
        {
            "attentions.0.attn": "cross_attn",
            "attentions.1.attn": "self_attn",
            "norms.0": "cross_attn_layer_norm",
            "norms.1": "self_attn_layer_norm",
            "norms.2": "final_layer_norm",
            **FEED_FORWARD,
        },
    ),
    (
        r"panoptic_head\.",
        f"{QUERIES}.",
        {
            "transformer_decoder.post_norm": "decoder.layernorm",
            "query_embed": "queries_embedder",
            "query_feat": "queries_features",
            "level_embed": "level_embed",
            **{f"mask_embed.{2 * i}": f"decoder.mask_predictor.mask_embedder.{i}.0" for i in range(3)},
        },
    ),
    (r"panoptic_head\.", "", {"cls_embed": "class_predictor"}),
)
RULES = [
    (re.compile(rf"{begin}{re.escape(theirs)}(?=\.|$)"), our_begin + ours)
    for begin, our_begin, parts in PARTS
    for theirs, ours in parts.items()
]


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under transformers' names; one that no rule knows keeps its own."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.endswith(".relative_position_index"):  # numbers that follow from the sizes
            renamed |= _in_parts(_renamed(name), value)
    return renamed


def _renamed(name: str) -> str:
    for theirs, ours in RULES:
        if theirs.match(name):
            return theirs.sub(ours, name, count=1)
    return name


def _in_parts(name: str, value: Tensor) -> dict[str, Tensor]:
    """One packed projection as the three that transformers has, a merge of patches in its order."""
    if ".downsample." in name:
        return {name: _in_merge_order(value)}
    if ".self.qkv." in name:
        parts = ("self.query", "self.key", "self.value")
        return {name.replace("self.qkv", part): third for part, third in zip(parts, _thirds(value))}
    if packed := re.match(r"(.+\.self_attn)\.in_proj_(weight|bias)$", name):
        return {
            f"{packed[1]}.{letter}_proj.{packed[2]}": third for letter, third in zip("qkv", _thirds(value))
        }
    return {name: value}


def _thirds(value: Tensor) -> list[Tensor]:
    return [third.contiguous() for third in value.chunk(3)]


def _in_merge_order(value: Tensor) -> Tensor:
    """The last dimension of [..., 4 C] from mmdetection's order to transformers'.

    Four neighbours become one: mmdetection has them as torch.nn.Unfold gives them, the channel outside, then the rows,
    then the columns; transformers as Swin's authors do, the columns outside, then the rows, then the channel.
    """
    channels = value.shape[-1] // 4
    neighbours = value.unflatten(-1, (channels, 2, 2))  # [..., channel, row, column]
    return neighbours.movedim(-3, -1).transpose(-3, -2).flatten(-3).contiguous()
