"""Names of open_clip's CLIP models to those of transformers' `CLIPModel`.

visual.conv1, class_embedding, positional_embedding   vision_model.embeddings.*
visual.ln_pre, visual.ln_post                         vision_model.pre_layrnorm, post_layernorm
visual.proj, text_projection                          visual_projection, text_projection, transposed
token_embedding, positional_embedding, ln_final       text_model.embeddings.*, final_layer_norm
[visual.]transformer.resblocks.N                      {vision,text}_model.encoder.layers.N
    ln_1, ln_2, mlp.c_fc, mlp.c_proj                      layer_norm1, layer_norm2, mlp.fc1, mlp.fc2
    attn.in_proj_weight, attn.in_proj_bias                self_attn.{q,k,v}_proj, a third of the rows each
    attn.out_proj                                         self_attn.out_proj
"""

import re
from collections.abc import Mapping

from torch import Tensor

WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)$")


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under transformers' names; one that open_clip's CLIP does not have keeps its own."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        block = BLOCK.match(name)
        if name in WHOLE:
            renamed[WHOLE[name]] = value
        elif name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = value.T.contiguous()
        elif block:
            tower = "vision_model" if block[1] else "text_model"
            renamed |= _of_block(f"{tower}.encoder.layers.{block[2]}", block[3], block[4], value)
        else:
            renamed[name] = value
    return renamed


def _of_block(layer: str, part: str, kind: str, value: Tensor) -> dict[str, Tensor]:
    if part == "attn.in_proj":
        thirds = zip("qkv", value.chunk(3))
        return {f"{layer}.self_attn.{letter}_proj.{kind}": third.contiguous() for letter, third in thirds}
    return {f"{layer}.{PARTS.get(part, part)}.{kind}": value}
