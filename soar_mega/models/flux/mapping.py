"""The tensors of diffusers' FluxTransformer2DModel and ours."""

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
)
from soar_mega.models.common.vector_embeddings import TIMESTEP_CHANNELS
from soar_mega.models.flux.sizes import FluxSizes


def entries(sizes: FluxSizes) -> list[Entry]:
    """All tensors of a model, in the order of the layers."""
    hidden, patch = sizes.hidden_size, sizes.patch_size**2 * sizes.in_channels
    widths = {"timestep_embedder": TIMESTEP_CHANNELS}
    if sizes.guidance_embeds:
        widths["guidance_embedder"] = TIMESTEP_CHANNELS
    widths["text_embedder"] = sizes.pooled_projection_dim
    table = []
    for name, width in widths.items():
        table += two_layers(f"time_text_embed.{name}", hidden, width)
    table += linear("context_embedder", "context_embedder", hidden, sizes.joint_attention_dim)
    table += linear("x_embedder", "x_embedder", hidden, patch)
    for number in range(sizes.num_double_layers):
        table += _double_layer(sizes, f"layers.{number}", f"transformer_blocks.{number}")
    for number in range(sizes.num_single_layers):
        ours = f"layers.{sizes.num_double_layers + number}"
        table += _single_layer(sizes, ours, f"single_transformer_blocks.{number}")
    table += linear("norm_out.linear", "norm_out.linear", 2 * hidden, hidden)
    return table + linear("proj_out", "proj_out", patch, hidden)


def _double_layer(sizes: FluxSizes, ours: str, theirs: str) -> list[Entry]:
    hidden = sizes.hidden_size
    table = linear(f"{ours}.image.modulation.linear", f"{theirs}.norm1.linear", 6 * hidden, hidden)
    table += linear(f"{ours}.text.modulation.linear", f"{theirs}.norm1_context.linear", 6 * hidden, hidden)
    for stream, keys, output, key in (
        ("image", (QKV, NORMS), "to_out.0", "ff"),
        ("text", (ADDED_QKV, ADDED_NORMS), "to_add_out", "ff_context"),
    ):
        attention, head_dim = f"{ours}.{stream}.attention", sizes.attention_head_dim
        table += attention_inputs(attention, f"{theirs}.attn", hidden, head_dim, *keys)
        table += linear(f"{attention}.linear_proj", f"{theirs}.attn.{output}", hidden, hidden)
        table += feed_forward(f"{ours}.{stream}.mlp", f"{theirs}.{key}", hidden)
    return table


def _single_layer(sizes: FluxSizes, ours: str, theirs: str) -> list[Entry]:
    hidden = sizes.hidden_size
    table = linear(f"{ours}.modulation.linear", f"{theirs}.norm.linear", 3 * hidden, hidden)
    table += linear(f"{ours}.mlp.linear_fc1", f"{theirs}.proj_mlp", 4 * hidden, hidden)
    output = (f"{theirs}.proj_out.weight",)  # of attention and MLP side by side
    return [
        *table,
        *attention_inputs(
            f"{ours}.attention", f"{theirs}.attn", hidden, sizes.attention_head_dim, QKV, NORMS
        ),
        Entry(f"{ours}.attention.linear_proj.weight", output, (hidden, hidden), range(hidden)),
        Entry(f"{ours}.mlp.linear_fc2.weight", output, (hidden, 4 * hidden), range(hidden, 5 * hidden)),
        Entry(f"{ours}.mlp.linear_fc2.bias", (f"{theirs}.proj_out.bias",), (hidden,)),
    ]
