"""The layout of sd3.5_*.safetensors."""

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

HEAD_DIM = 64  # of all published models; files without QK norms do not tell


def _config(shapes: Shapes, told: dict[str, Any]) -> dict[str, Any]:
    hidden, joint = shapes["context_embedder.weight"]
    _, channels, patch, _ = shapes["x_embedder.proj.weight"]
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head_dim = norm[0] if norm else told.get("attention_head_dim", HEAD_DIM)
    layers = count(shapes, "joint_blocks")
    duals = [n for n in range(layers) if f"joint_blocks.{n}.x_block.attn2.qkv.weight" in shapes]
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": told.get("sample_size", 128),
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "num_attention_heads": hidden // head_dim,
        "attention_head_dim": head_dim,
        "joint_attention_dim": joint,
        "caption_projection_dim": hidden,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": round(shapes["pos_embed"][1] ** 0.5),
        "dual_attention_layers": duals,
        "qk_norm": "rms_norm" if norm else None,
    }


def _tensors(config: dict[str, Any]) -> list[OriginalTensor]:
    table = [OriginalTensor("pos_embed", ("pos_embed.pos_embed",))]
    table += renamed(
        "",
        {
            "pos_embed.proj": "x_embedder.proj",
            "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
            "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
            "context_embedder": "context_embedder",
        },
    )
    for number in range(config["num_layers"]):
        table += _block(config, number)
    table += swapped("final_layer.adaLN_modulation.1", "norm_out.linear")
    return table + renamed("", {"proj_out": "final_layer.linear"})


def _block(config: dict[str, Any], number: int) -> list[OriginalTensor]:
    ours, image, text = (
        f"transformer_blocks.{number}.",
        f"joint_blocks.{number}.x_block",
        f"joint_blocks.{number}.context_block",
    )
    table = fused(f"{image}.attn.qkv", [f"{ours}attn.{name}" for name in QKV])
    table += fused(f"{text}.attn.qkv", [f"{ours}attn.{name}" for name in ADDED_QKV])
    linears = {
        "attn.to_out.0": f"{image}.attn.proj",
        "norm1.linear": f"{image}.adaLN_modulation.1",
        "ff.net.0.proj": f"{image}.mlp.fc1",
        "ff.net.2": f"{image}.mlp.fc2",
    }
    norms = {
        "attn.norm_q": f"{image}.attn.ln_q",
        "attn.norm_k": f"{image}.attn.ln_k",
        "attn.norm_added_q": f"{text}.attn.ln_q",
        "attn.norm_added_k": f"{text}.attn.ln_k",
    }
    if number in (config.get("dual_attention_layers") or ()):
        table += fused(f"{image}.attn2.qkv", [f"{ours}attn2.{name}" for name in QKV])
        linears["attn2.to_out.0"] = f"{image}.attn2.proj"
        norms |= {"attn2.norm_q": f"{image}.attn2.ln_q", "attn2.norm_k": f"{image}.attn2.ln_k"}
    if number == config["num_layers"] - 1:  # of the text, only keys and values are used
        table += swapped(f"{text}.adaLN_modulation.1", f"{ours}norm1_context.linear")
    else:
        linears |= {
            "attn.to_add_out": f"{text}.attn.proj",
            "norm1_context.linear": f"{text}.adaLN_modulation.1",
            "ff_context.net.0.proj": f"{text}.mlp.fc1",
            "ff_context.net.2": f"{text}.mlp.fc2",
        }
    if config.get("qk_norm"):
        table += renamed(ours, norms, ("weight",))
    return table + renamed(ours, linears)


ORIGINAL = OriginalLayout("joint_blocks.0.x_block.attn.qkv.weight", _config, _tensors)
