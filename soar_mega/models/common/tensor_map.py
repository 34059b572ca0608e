"""Which tensors of a diffusers transformer make which of ours: plain copies, but for q, k and v fused by heads."""

from dataclasses import dataclass

from torch import Tensor


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


def linear(ours: str, theirs: str, rows: int, columns: int) -> list[Entry]:
    """Weight and bias of a linear."""
    return weight_and_bias(ours, theirs, (rows, columns))


def weight_and_bias(ours: str, theirs: str, shape: tuple[int, ...]) -> list[Entry]:
    """A weight of that shape, and a bias for each of its rows."""
    return [
        Entry(f"{ours}.weight", (f"{theirs}.weight",), shape),
        Entry(f"{ours}.bias", (f"{theirs}.bias",), shape[:1]),
    ]
