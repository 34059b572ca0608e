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
SWIN = f"{PIXELS}.encoder.encoder.layers"
DEFORMABLE = f"{PIXELS}.decoder.encoder.layers"
MASKED = "model.transformer_module.decoder.layers"
QUERIES = "model.transformer_module"

# Numbers that follow from the sizes.
UNUSED = re.compile(r".*\.relative_position_index$")
RULES = [
    (re.compile(rf"{theirs}(?=\.|$)"), ours)
    for theirs, ours in (
        (r"backbone\.patch_embed\.projection", rf"{PIXELS}.encoder.embeddings.patch_embeddings.projection"),
        (r"backbone\.patch_embed\.norm", rf"{PIXELS}.encoder.embeddings.norm"),
        (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm1", rf"{SWIN}.\1.blocks.\2.layernorm_before"),
        (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm2", rf"{SWIN}.\1.blocks.\2.layernorm_after"),
        (
            r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.proj",
            rf"{SWIN}.\1.blocks.\2.attention.output.dense",
        ),
        (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa", rf"{SWIN}.\1.blocks.\2.attention.self"),
        (
            r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.0\.0",
            rf"{SWIN}.\1.blocks.\2.intermediate.dense",
        ),
        (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.1", rf"{SWIN}.\1.blocks.\2.output.dense"),
        (r"backbone\.stages\.(\d+)\.downsample", rf"{SWIN}.\1.downsample"),
        (
            r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv",
            rf"{PIXELS}.decoder.input_projections.\1.0",
        ),
        (
            r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn",
            rf"{PIXELS}.decoder.input_projections.\1.1",
        ),
        (
            r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0",
            rf"{DEFORMABLE}.\1.self_attn",
        ),
        (
            r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0",
            rf"{DEFORMABLE}.\1.self_attn_layer_norm",
        ),
        (
            r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1",
            rf"{DEFORMABLE}.\1.final_layer_norm",
        ),
        (
            r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0",
            rf"{DEFORMABLE}.\1.fc1",
        ),
        (
            r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.1",
            rf"{DEFORMABLE}.\1.fc2",
        ),
        (r"panoptic_head\.pixel_decoder\.level_encoding\.weight", rf"{PIXELS}.decoder.level_embed"),
        (r"panoptic_head\.pixel_decoder\.mask_feature", rf"{PIXELS}.decoder.mask_projection"),
        (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv", rf"{PIXELS}.decoder.adapter_1.0"),
        (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn", rf"{PIXELS}.decoder.adapter_1.1"),
        (r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv", rf"{PIXELS}.decoder.layer_1.0"),
        (r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn", rf"{PIXELS}.decoder.layer_1.1"),
        (
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn",
            rf"{MASKED}.\1.cross_attn",
        ),
        (
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn",
            rf"{MASKED}.\1.self_attn",
        ),
        (
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.0",
            rf"{MASKED}.\1.cross_attn_layer_norm",
        ),
        (
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.1",
            rf"{MASKED}.\1.self_attn_layer_norm",
        ),
        (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.2", rf"{MASKED}.\1.final_layer_norm"),
        (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0", rf"{MASKED}.\1.fc1"),
        (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.1", rf"{MASKED}.\1.fc2"),
        (r"panoptic_head\.transformer_decoder\.post_norm", rf"{QUERIES}.decoder.layernorm"),
        (r"panoptic_head\.query_embed", rf"{QUERIES}.queries_embedder"),
        (r"panoptic_head\.query_feat", rf"{QUERIES}.queries_features"),
        (r"panoptic_head\.level_embed", rf"{QUERIES}.level_embed"),
        (r"panoptic_head\.cls_embed", "class_predictor"),
    )
]
STAGE_NORM = re.compile(r"backbone\.norm(\d)\.(weight|bias)$")
MASK_EMBED = re.compile(r"panoptic_head\.mask_embed\.([024])\.(weight|bias)$")


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under transformers' names; one that no rule knows keeps its own."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if UNUSED.match(name):
            continue
        if stage := STAGE_NORM.match(name):
            renamed[f"{PIXELS}.encoder.hidden_states_norms.stage{int(stage[1]) + 1}.{stage[2]}"] = value
        elif embed := MASK_EMBED.match(name):
            place = f"{QUERIES}.decoder.mask_predictor.mask_embedder.{int(embed[1]) // 2}.0"
            renamed[f"{place}.{embed[2]}"] = value
        else:
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
