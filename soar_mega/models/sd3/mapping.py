"""The tensors of diffusers' SD3Transformer2DModel and ours."""

from soar_mega.models.common.tensor_map import (
    ADDED_NORMS,
    ADDED_QKV,
    NORMS,
    QKV,
    Entry,
    attention_inputs,
    feed_forward,
    linear,
    two_layers,
    weight_and_bias,
)
from soar_mega.models.common.vector_embeddings import TIMESTEP_CHANNELS
from soar_mega.models.sd3.sizes import SD3Sizes


def entries(config: SD3Sizes) -> list[Entry]:
    """All tensors of a model, in the order of the layers."""
    hidden, patch = config.hidden_size, config.patch_size
    table = [
        Entry("pos_embed.pos_embed", ("pos_embed.pos_embed",), (1, config.pos_embed_max_size**2, hidden)),
        *weight_and_bias("pos_embed.proj", "pos_embed.proj", (hidden, config.in_channels, patch, patch)),
    ]
    for name, width in (
        ("timestep_embedder", TIMESTEP_CHANNELS),
        ("text_embedder", config.pooled_projection_dim),
    ):
        table += two_layers(f"time_text_embed.{name}", hidden, width)
    table += linear("context_embedder", "context_embedder", hidden, config.joint_attention_dim)
    for number in range(config.num_layers):
        table += _layer(config, number)
    table += linear("norm_out.linear", "norm_out.linear", 2 * hidden, hidden)
    table += linear("proj_out", "proj_out", patch**2 * config.out_channels, hidden)
    return table


def _layer(config: SD3Sizes, number: int) -> list[Entry]:
    hidden, is_last = config.hidden_size, number == config.num_layers - 1
    is_dual = number in config.dual_attention_layers
    ours, theirs = f"layers.{number}", f"transformer_blocks.{number}"
    parts = 9 if is_dual else 6
    table = linear(f"{ours}.image.modulation.linear", f"{theirs}.norm1.linear", parts * hidden, hidden)
    parts = 2 if is_last else 6
    table += linear(
        f"{ours}.text.modulation.linear", f"{theirs}.norm1_context.linear", parts * hidden, hidden
    )
    image_keys, text_keys = (QKV, NORMS, "to_out.0"), (ADDED_QKV, ADDED_NORMS, "to_add_out")
    table += _attention(config, f"{ours}.image.attention", f"{theirs}.attn", *image_keys)
    table += _attention(
        config, f"{ours}.text.attention", f"{theirs}.attn", *text_keys, has_output=not is_last
    )
    if is_dual:
        table += _attention(config, f"{ours}.image.dual_attention", f"{theirs}.attn2", *image_keys)
    table += feed_forward(f"{ours}.image.mlp", f"{theirs}.ff", hidden)
    if not is_last:
        table += feed_forward(f"{ours}.text.mlp", f"{theirs}.ff_context", hidden)
    return table


def _attention(
    config: SD3Sizes,
    ours: str,
    theirs: str,
    qkv: tuple[str, ...],
    norms: tuple[str, str],
    output: str,
    has_output: bool = True,
) -> list[Entry]:
    hidden = config.hidden_size
    head_dim = config.attention_head_dim if config.qk_norm is not None else None
    table = attention_inputs(ours, theirs, hidden, head_dim, qkv, norms)
    if has_output:
        table += linear(f"{ours}.linear_proj", f"{theirs}.{output}", hidden, hidden)
    return table
