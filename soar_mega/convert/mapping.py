"""Which diffusers tensors make which of our tensors: plain copies, except that q, k and v are fused by heads."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from soar_mega.models.config import MMDiTConfig
from soar_mega.models.embeddings import TIMESTEP_CHANNELS


@dataclass(frozen=True)
class Entry:
    """One of our tensors.

    Attributes:
        keys: the diffusers tensor with the same content, or the three of q, k and v.
        shape: of each of those, or of its columns.
        columns: which of the diffusers tensor's; None: all. The others are in the entries that follow.
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    columns: range | None = None


def key_shapes(table: list[Entry]) -> dict[str, tuple[int, ...]]:
    """The shape of every diffusers tensor, in the order of the table."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in table:
        for key in entry.keys:
            if entry.columns is not None:
                shapes[key] = (entry.shape[0], entry.columns.stop)
            else:
                shapes[key] = entry.shape
    return shapes


def entries(config: MMDiTConfig) -> list[Entry]:
    """All tensors of a model, in the order of the layers."""
    hidden, patch = config.hidden_size, config.patch_size
    table = [
        Entry("pos_embed.pos_embed", ("pos_embed.pos_embed",), (1, config.pos_embed_max_size**2, hidden)),
        *pair_entries("pos_embed.proj", "pos_embed.proj", (hidden, config.in_channels, patch, patch)),
    ]
    for name, width in (
        ("timestep_embedder", TIMESTEP_CHANNELS),
        ("text_embedder", config.pooled_projection_dim),
    ):
        table += linear_entries(
            f"time_text_embed.{name}.linear_1", f"time_text_embed.{name}.linear_1", hidden, width
        )
        table += linear_entries(
            f"time_text_embed.{name}.linear_2", f"time_text_embed.{name}.linear_2", hidden, hidden
        )
    table += linear_entries("context_embedder", "context_embedder", hidden, config.joint_attention_dim)
    for number in range(config.num_layers):
        table += _layer(config, number)
    table += linear_entries("norm_out.linear", "norm_out.linear", 2 * hidden, hidden)
    table += linear_entries("proj_out", "proj_out", patch**2 * config.out_channels, hidden)
    return table


def parts(tensor: Tensor, entry: Entry, heads: int) -> list[Tensor]:
    """Where the content of each of an entry's keys is in our tensor: views, of q, k and v each [heads, D, ...].

    Args:
        heads: that the tensor has, which are fewer in a shard.
    """
    if len(entry.keys) == 1:
        return [tensor]
    return list(tensor.unflatten(0, (heads, len(entry.keys), -1)).unbind(1))


def _layer(config: MMDiTConfig, number: int) -> list[Entry]:
    hidden, is_last = config.hidden_size, number == config.num_layers - 1
    is_dual = number in config.dual_attention_layers
    ours, theirs = f"layers.{number}", f"transformer_blocks.{number}"
    parts = 9 if is_dual else 6
    table = linear_entries(f"{ours}.image.modulation.linear", f"{theirs}.norm1.linear", parts * hidden, hidden)
    parts = 2 if is_last else 6
    table += linear_entries(
        f"{ours}.text.modulation.linear", f"{theirs}.norm1_context.linear", parts * hidden, hidden
    )
    has_norm = config.qk_norm is not None
    image_keys = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k") if has_norm else None, "to_out.0"
    text_keys = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k") if has_norm else None
    table += attention_entries(config, f"{ours}.image.attention", f"{theirs}.attn", *image_keys)
    table += attention_entries(
        config, f"{ours}.text.attention", f"{theirs}.attn", *text_keys, None if is_last else "to_add_out"
    )
    if is_dual:
        table += attention_entries(config, f"{ours}.image.dual_attention", f"{theirs}.attn2", *image_keys)
    for stream, key in (("image", "ff"), ("text", "ff_context")):
        if stream == "image" or not is_last:
            table += linear_entries(
                f"{ours}.{stream}.mlp.linear_fc1", f"{theirs}.{key}.net.0.proj", 4 * hidden, hidden
            )
            table += linear_entries(f"{ours}.{stream}.mlp.linear_fc2", f"{theirs}.{key}.net.2", hidden, 4 * hidden)
    return table


def attention_entries(
    config: Any, ours: str, theirs: str, qkv: tuple[str, ...], norms: tuple[str, str] | None, output: str | None
) -> list[Entry]:
    """Of one stream's way into attention and out of it.

    Args:
        qkv, norms, output: what diffusers calls them; None: there are none.
    """
    hidden = config.hidden_size
    keys = [f"{theirs}.{key}" for key in qkv]
    table = [
        Entry(f"{ours}.linear_qkv.weight", tuple(f"{key}.weight" for key in keys), (hidden, hidden)),
        Entry(f"{ours}.linear_qkv.bias", tuple(f"{key}.bias" for key in keys), (hidden,)),
    ]
    for name, key in zip(("q_layernorm", "k_layernorm"), norms or ()):
        shape = (config.attention_head_dim,)
        table.append(Entry(f"{ours}.{name}.weight", (f"{theirs}.{key}.weight",), shape))
    if output is not None:
        table += linear_entries(f"{ours}.linear_proj", f"{theirs}.{output}", hidden, hidden)
    return table


def linear_entries(ours: str, theirs: str, rows: int, columns: int) -> list[Entry]:
    return pair_entries(ours, theirs, (rows, columns))


def pair_entries(ours: str, theirs: str, shape: tuple[int, ...]) -> list[Entry]:
    return [
        Entry(f"{ours}.weight", (f"{theirs}.weight",), shape),
        Entry(f"{ours}.bias", (f"{theirs}.bias",), shape[:1]),
    ]
