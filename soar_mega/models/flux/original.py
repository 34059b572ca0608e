"""The layout of flux1-*.safetensors."""

from typing import Any

from soar_mega.models.common.original_layout import (
    OriginalLayout,
    OriginalTensor,
    Shapes,
    count,
    fused,
    renamed,
    swapped,
)
from soar_mega.models.common.tensor_map import ADDED_QKV, QKV

AXES = [16, 56, 56]  # of all published models; no tensor tells
EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}


def _config(shapes: Shapes, told: dict[str, Any]) -> dict[str, Any]:
    hidden, channels = shapes["img_in.weight"]
    head_dim = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    out = shapes["final_layer.linear.weight"][0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": count(shapes, "double_blocks"),
        "num_single_layers": count(shapes, "single_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": told.get("axes_dims_rope", AXES),
    }


def _tensors(config: dict[str, Any]) -> list[OriginalTensor]:
    table = renamed("", {"x_embedder": "img_in", "context_embedder": "txt_in"})
    for original, name in EMBEDDERS.items():
        if original != "guidance_in" or config["guidance_embeds"]:
            linears = {"linear_1": f"{original}.in_layer", "linear_2": f"{original}.out_layer"}
            table += renamed(f"time_text_embed.{name}.", linears)
    for number in range(config["num_layers"]):
        table += _double_block(number)
    for number in range(config["num_single_layers"]):
        table += _single_block(number)
    table += swapped("final_layer.adaLN_modulation.1", "norm_out.linear")
    return table + renamed("", {"proj_out": "final_layer.linear"})


def _double_block(number: int) -> list[OriginalTensor]:
    ours, theirs = f"transformer_blocks.{number}.", f"double_blocks.{number}"
    table = fused(f"{theirs}.img_attn.qkv", [f"{ours}attn.{name}" for name in QKV])
    table += fused(f"{theirs}.txt_attn.qkv", [f"{ours}attn.{name}" for name in ADDED_QKV])
    norms = {
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
    }
    table += [
        OriginalTensor(f"{theirs}.{name}.scale", (f"{ours}{key}.weight",)) for key, name in norms.items()
    ]
    linears = {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }
    return table + renamed(ours, {key: f"{theirs}.{name}" for key, name in linears.items()})


def _single_block(number: int) -> list[OriginalTensor]:
    ours, theirs = f"single_transformer_blocks.{number}.", f"single_blocks.{number}"
    table = fused(f"{theirs}.linear1", [*(f"{ours}attn.{name}" for name in QKV), f"{ours}proj_mlp"])
    table += [
        OriginalTensor(f"{theirs}.norm.{name}.scale", (f"{ours}attn.{key}.weight",))
        for key, name in (("norm_q", "query_norm"), ("norm_k", "key_norm"))
    ]
    return table + renamed(ours, {"norm.linear": f"{theirs}.modulation.lin", "proj_out": f"{theirs}.linear2"})


ORIGINAL = OriginalLayout("double_blocks.0.img_attn.qkv.weight", _config, _tensors)
