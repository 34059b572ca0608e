"""Which tensors of a diffusers transformer make which of ours: plain copies, but for q, k and v fused by heads."""

from dataclasses import dataclass

from torch import Tensor

# diffusers' names of the linears and norms of a stream on its way into attention
QKV, NORMS = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
ADDED_QKV, ADDED_NORMS = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")


@dataclass(frozen=True)
class Entry:
    """One of our tensors.

    Attributes:
        keys: the diffusers tensor with the same content, or the three of q, k and v.
        shape: of each of those, or of the columns of it that are in our tensor.
        columns: which ones; None: all. The others are in the entries that follow.
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    columns: range | None = None


def key_shapes(table: list[Entry]) -> dict[str, tuple[int, ...]]:
    """The shape of every diffusers tensor, in the order of the table."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in table:
        width = () if entry.columns is None else (entry.columns.stop,)  # of the last of them in the end
        shapes.update(dict.fromkeys(entry.keys, (entry.shape[0], *width) if width else entry.shape))
    return shapes


def parts(tensor: Tensor, entry: Entry, heads: int) -> list[Tensor]:
    """Where the content of each of an entry's keys is in our tensor: views, of q, k and v each [heads, D, ...].

    Args:
        heads: that the tensor has, which are fewer in a shard.
    """
    if len(entry.keys) == 1:
        return [tensor]
    return list(tensor.unflatten(0, (heads, len(entry.keys), -1)).unbind(1))


def attention_inputs(
    ours: str, theirs: str, hidden: int, head_dim: int | None, qkv: tuple[str, ...], norms: tuple[str, ...]
) -> list[Entry]:
    """Fused q, k and v, and the norms [head_dim] of queries and keys; None: there are none."""
    keys = [f"{theirs}.{key}" for key in qkv]
    table = [
        Entry(f"{ours}.linear_qkv.weight", tuple(f"{key}.weight" for key in keys), (hidden, hidden)),
        Entry(f"{ours}.linear_qkv.bias", tuple(f"{key}.bias" for key in keys), (hidden,)),
    ]
    if head_dim is not None:
        for name, key in zip(("q_layernorm", "k_layernorm"), norms, strict=True):
            table.append(Entry(f"{ours}.{name}.weight", (f"{theirs}.{key}.weight",), (head_dim,)))
    return table


def feed_forward(ours: str, theirs: str, hidden: int) -> list[Entry]:
    """The two linears of an MLP."""
    table = linear(f"{ours}.linear_fc1", f"{theirs}.net.0.proj", 4 * hidden, hidden)
    return table + linear(f"{ours}.linear_fc2", f"{theirs}.net.2", hidden, 4 * hidden)


def two_layers(name: str, hidden: int, width: int) -> list[Entry]:
    """A vector's way in (`vector_embeddings.TwoLayers`), called the same by diffusers."""
    first, second = (f"{name}.linear_{number}" for number in (1, 2))
    return linear(first, first, hidden, width) + linear(second, second, hidden, hidden)


def linear(ours: str, theirs: str, rows: int, columns: int) -> list[Entry]:
    """Weight and bias of a linear."""
    return weight_and_bias(ours, theirs, (rows, columns))


def weight_and_bias(ours: str, theirs: str, shape: tuple[int, ...]) -> list[Entry]:
    """A weight of that shape, and a bias for each of its rows."""
    return [
        Entry(f"{ours}.weight", (f"{theirs}.weight",), shape),
        Entry(f"{ours}.bias", (f"{theirs}.bias",), shape[:1]),
    ]
