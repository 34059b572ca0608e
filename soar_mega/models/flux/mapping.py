"""The tensors of diffusers' FluxTransformer2DModel and ours."""

from soar_mega.models.common.tensor_map import Entry, linear
from soar_mega.models.common.vector_embeddings import TIMESTEP_CHANNELS
from soar_mega.models.flux.sizes import FluxSizes

IMAGE = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")


def entries(sizes: FluxSizes) -> list[Entry]:
    """All tensors of a model, in the order of the layers."""
    hidden, patch = sizes.hidden_size, sizes.patch_size**2 * sizes.in_channels
    widths = {"timestep_embedder": TIMESTEP_CHANNELS}
    if sizes.guidance_embeds:
        widths["guidance_embedder"] = TIMESTEP_CHANNELS
    widths["text_embedder"] = sizes.pooled_projection_dim
    table = []
    for name, width in widths.items():
        first, second = (f"time_text_embed.{name}.linear_{number}" for number in (1, 2))
        table += linear(first, first, hidden, width) + linear(second, second, hidden, hidden)
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
        ("image", IMAGE, "to_out.0", "ff"),
        ("text", TEXT, "to_add_out", "ff_context"),
    ):
        attention, mlp = f"{ours}.{stream}.attention", f"{ours}.{stream}.mlp"
        table += _qkv(sizes, attention, f"{theirs}.attn", *keys)
        table += linear(f"{attention}.linear_proj", f"{theirs}.attn.{output}", hidden, hidden)
        table += linear(f"{mlp}.linear_fc1", f"{theirs}.{key}.net.0.proj", 4 * hidden, hidden)
        table += linear(f"{mlp}.linear_fc2", f"{theirs}.{key}.net.2", hidden, 4 * hidden)
    return table


def _single_layer(sizes: FluxSizes, ours: str, theirs: str) -> list[Entry]:
    hidden = sizes.hidden_size
    table = linear(f"{ours}.modulation.linear", f"{theirs}.norm.linear", 3 * hidden, hidden)
    table += linear(f"{ours}.mlp.linear_fc1", f"{theirs}.proj_mlp", 4 * hidden, hidden)
    output = (f"{theirs}.proj_out.weight",)  # of attention and MLP side by side
    return [
        *table,
        *_qkv(sizes, f"{ours}.attention", f"{theirs}.attn", *IMAGE),
        Entry(f"{ours}.attention.linear_proj.weight", output, (hidden, hidden), range(hidden)),
        Entry(f"{ours}.mlp.linear_fc2.weight", output, (hidden, 4 * hidden), range(hidden, 5 * hidden)),
        Entry(f"{ours}.mlp.linear_fc2.bias", (f"{theirs}.proj_out.bias",), (hidden,)),
    ]


def _qkv(
    sizes: FluxSizes, ours: str, theirs: str, qkv: tuple[str, ...], norms: tuple[str, ...]
) -> list[Entry]:
    hidden = sizes.hidden_size
    keys = [f"{theirs}.{key}" for key in qkv]
    table = [
        Entry(f"{ours}.linear_qkv.weight", tuple(f"{key}.weight" for key in keys), (hidden, hidden)),
        Entry(f"{ours}.linear_qkv.bias", tuple(f"{key}.bias" for key in keys), (hidden,)),
    ]
    for name, key in zip(("q_layernorm", "k_layernorm"), norms, strict=True):
        table.append(Entry(f"{ours}.{name}.weight", (f"{theirs}.{key}.weight",), (sizes.attention_head_dim,)))
    return table
