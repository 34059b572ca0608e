"""What both SOAR kernels read: six sources, and a table that says which of them a point reads, and how much of each.

A point reads the sources of one sample; eps and z1_aux may be different ones for each of a sample's rollout paths, but
then they are drawn in the kernel. Rows, indices and positions are made on the CPU; the table goes to the device once,
for many calls.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soar_mega.flow import SOURCES, normal, weighted_sum
from soar_mega.flow.noise import stream_key
from soar_mega.kernels.dispatch import LARGEST_ROW, check_tensor, once_per_layout
from soar_mega.upload import upload

STREAMS = {"z1": "noise", "eps": "rollout", "z1_aux": "endpoint"}  # the stream that keys each drawn source
SAMPLE, PATH, POSITION, FIRST, END, KEYS, ANSWER = 0, 1, 2, 3, 4, slice(5, 8), 8  # words of a group
WEIGHT, GROUP = 6, 7  # words of a point, behind its row
GROUP_WORDS, POINT_WORDS = 10, 8
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PointTable:
    """Where P points read, on the device of the sources (the words: `soar_mega.kernels.source.point_tables`)."""

    groups: Tensor  # [G, 10] int64, G runs of points that read the same
    points: Tensor  # [P, 8] float32: the row, the weight, the number of the group
    used: tuple[bool, ...]  # of the six sources, whether a row reads it
    drawn: tuple[bool, ...]  # whether it is drawn
    seed: int

    def __len__(self) -> int:
        return len(self.points)

    def column(self, word: int) -> Tensor:
        """A word of each point's group: [P] int64."""
        return self.groups[self.points[:, GROUP].long(), word]

    def read(self, sources: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The sources that the rows read.

        Raises:
            ValueError: one of them is neither given nor drawn.
        """
        for name, source, is_used, is_drawn in zip(SOURCES, sources, self.used, self.drawn, strict=True):
            if is_used and source is None and not is_drawn:
                raise ValueError(f"the rows read {name}, which is missing")
        return [source if is_used else None for source, is_used in zip(sources, self.used, strict=True)]

    def draws(self) -> dict[str, bool]:
        """What a kernel makes itself, by the name of its constant."""
        made = [used and drawn for used, drawn in zip(self.used, self.drawn, strict=True)]
        return {"DRAW_Z1": made[1], "DRAW_EPS": made[4], "DRAW_Z1_AUX": made[5]}


def group_table(
    sample: Tensor, path: Tensor, answer: Tensor, position: Tensor | None, seed: int, size: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Groups of P points that are cut into calls of `size` points each, on the CPU.

    Args:
        sample, path, answer: [P] int64: the row of z0 (and z1, eps, z1_aux), the rollout path, the row of v_uncond and
            v_cond.
        position: [P] int64 in the training sequence; None: nothing is drawn.

    Returns:
        groups [G, 10] int64, each point's group within its call [P], and where the groups of each call begin, with the
        end of the last.
    """
    place = torch.arange(len(sample))
    starts = place % size == 0
    for column in (sample, path, answer):
        starts[1:] |= column.diff() != 0
    number = starts.cumsum(0) - 1
    first = place[starts]
    call = first // size
    groups = torch.zeros(len(first), GROUP_WORDS, dtype=torch.int64)
    groups[:, SAMPLE], groups[:, PATH], groups[:, ANSWER] = sample[first], path[first], answer[first]
    groups[:, FIRST] = first - call * size
    groups[:-1, END], groups[-1, END] = first[1:], len(sample)
    groups[:, END] -= call * size
    if position is not None:
        groups[:, POSITION] = position[first]
        groups[:, KEYS] = torch.tensor([signed_key(seed, stream) for stream in STREAMS.values()])
    begins = number[::size]
    return groups, number - begins.repeat_interleave(size)[: len(number)], [*begins.tolist(), len(groups)]


def point_table(rows: Tensor, group: Tensor, weight: Tensor | None = None) -> Tensor:
    """Points [P, 8] float32 of rows [P, 6] float64, on the CPU."""
    points = torch.empty(len(rows), POINT_WORDS)
    points[:, :6] = rows
    points[:, WEIGHT] = 1.0 if weight is None else weight
    points[:, GROUP] = group
    return points


def uses(rows: Tensor, size: int) -> list[tuple[bool, ...]]:
    """Of the six sources, by call of `size` points, whether a row reads it."""
    return [tuple(used) for used in torch.stack([r.ne(0).any(dim=0) for r in rows.split(size)]).tolist()]


def one_table(
    sources: Sequence[Tensor | None],
    rows: Tensor,
    *,
    weight: Tensor | None,
    sample: Tensor | None,
    path: Tensor | None,
    draw: Collection[str],
    seed: int,
    position: Tensor | None,
) -> tuple[PointTable, torch.Size]:
    """The table of a single call, and the leading dimensions of its states: [B, N] or [P].

    Raises:
        ValueError: names the argument that is wrong.
    """
    z0 = sources[0]
    assert z0 is not None
    check_sources(z0, *sources[1:])
    for name, source in zip(SOURCES[1:], sources[1:], strict=True):
        if source is not None:
            check_tensor(name, source, shape=tuple(z0.shape), device=z0.device)
    _check_draw(sources, draw, position, len(z0))
    leading = rows.shape[:-1]
    if rows.ndim == 3:
        if sample is not None or path is not None:
            raise ValueError(
                "sample and path go with rows [P, 6]; rows [B, N, 6] say themselves which sample they read"
            )
        check_tensor("rows", rows, shape=(len(z0), "N", 6), dtypes=(torch.float64,), device=_CPU)
        sample = torch.arange(len(z0)).repeat_interleave(rows.shape[1])
    else:
        check_tensor("rows", rows, shape=("P", 6), dtypes=(torch.float64,), device=_CPU)
        if sample is None:
            raise ValueError("sample is needed with rows [P, 6]: the sample that each point reads, [P] int64")
        check_tensor("sample", sample, shape=(len(rows),), dtypes=(torch.int64,), device=_CPU)
    if path is None:
        path = torch.zeros_like(sample)
    check_tensor("path", path, shape=tuple(sample.shape), dtypes=(torch.int64,), device=_CPU)
    lowest, highest = int(sample.min()), int(sample.max())
    if lowest < 0 or highest >= len(z0):
        raise ValueError(f"sample must lie in 0 ... {len(z0) - 1}, not in {lowest} ... {highest}")
    if weight is not None:
        check_tensor("weight", weight, shape=leading, dtypes=(torch.float64,), device=_CPU)
        weight = weight.flatten()
    rows = rows.reshape(-1, 6)
    places = None if position is None else position[sample]
    groups, group, _ = group_table(sample, path, sample, places, seed, len(rows))
    drawn = tuple(name in draw for name in SOURCES)
    groups, points = upload([groups, point_table(rows, group, weight)], z0.device)
    return PointTable(groups, points, uses(rows, len(rows))[0], drawn, seed), leading


@once_per_layout
def check_sources(
    z0: Tensor,
    z1: Tensor | None,
    v_uncond: Tensor | None,
    v_cond: Tensor | None,
    eps: Tensor | None,
    z1_aux: Tensor | None,
) -> bool:
    """Refuses sources that a kernel cannot index; v_uncond and v_cond may have rows of their own.

    Raises:
        ValueError: names the source that is wrong.
    """
    check_tensor("z0", z0, shape=("B", "C", "H", "W"))
    if z0[0].numel() > LARGEST_ROW:
        raise ValueError(f"z0 has {z0[0].numel()} elements per sample; at most {LARGEST_ROW} can be indexed")
    for name, source in zip(SOURCES[1:], (z1, v_uncond, v_cond, eps, z1_aux), strict=True):
        if source is not None:
            rows = "A" if name in ("v_uncond", "v_cond") else len(z0)
            check_tensor(name, source, shape=(rows, *z0.shape[1:]), device=z0.device)
    return True


def _check_draw(
    sources: Sequence[Tensor | None], draw: Collection[str], position: Tensor | None, batch: int
) -> None:
    for name in draw:
        if name not in STREAMS:
            raise ValueError(f"draw names {name!r}; only {', '.join(STREAMS)} can be drawn")
        if sources[SOURCES.index(name)] is not None:
            raise ValueError(f"{name} is given and named in draw: leave one out")
    if position is not None:
        check_tensor("position", position, shape=(batch,), dtypes=(torch.int64,), device=_CPU)
    elif draw:
        raise ValueError(
            "position is needed to draw: the samples' places in the training sequence, [B] int64"
        )


def combined(sources: Sequence[Tensor | None], table: PointTable) -> Tensor:
    """The eager twin of what the kernels form in registers: rows applied to the sources, [P, C, H, W] float32.

    Noise is drawn once for a group, as the kernels do.
    """
    z0 = sources[0]
    assert z0 is not None
    group = table.points[:, GROUP].long()
    found: list[Tensor | None] = []
    for name, source, is_used, is_drawn in zip(SOURCES, sources, table.used, table.drawn, strict=True):
        if not is_used:
            found.append(None)
        elif is_drawn:
            path = 0 if name == "z1" else table.groups[:, PATH]
            positions = table.groups[:, POSITION]
            found.append(normal(table.seed, STREAMS[name], positions, path, z0.shape[1:], z0.device)[group])
        else:
            assert source is not None
            row = table.groups[:, ANSWER if name in ("v_uncond", "v_cond") else SAMPLE]
            found.append(source[row[group]])
    return weighted_sum(table.points[:, :6], found)


def signed_key(seed: int, stream: str) -> int:
    """The two key words of a stream as one int64."""
    low, high = stream_key(seed, stream)
    key = high << 32 | low
    return key - 2**64 if key >= 2**63 else key
