"""The arguments that both SOAR kernels share: six sources, a row of coefficients per point, and which sample it reads.

A point reads the sources of one sample; eps and z1_aux may be different ones for each of a sample's rollout paths, but
then they are drawn in the kernel. Rows, indices and positions live on the CPU, where a stage makes them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soar_mega.flow import SOURCES, combine, normal
from soar_mega.flow.noise import stream_key
from soar_mega.kernels.dispatch import LARGEST_ROW, check_tensor

STREAMS = {"z1": "noise", "eps": "rollout", "z1_aux": "endpoint"}  # the stream that keys each drawn source
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Point:
    """Where the points of a call read, checked and flattened."""

    rows: Tensor  # [P, 6] float64
    sample: Tensor  # [P] int64
    path: Tensor  # [P] int64
    position: Tensor | None  # [B] int64
    drawn: list[bool]  # of the six sources, whether it is drawn
    leading: torch.Size  # [B, N] or [P], the leading dimensions of states


def check_points(
    sources: Sequence[Tensor | None],
    rows: Tensor,
    sample: Tensor | None,
    path: Tensor | None,
    draw: Collection[str],
    position: Tensor | None,
) -> Point:
    """Checks what `rollout_renoise` and `correction_loss` have in common.

    Raises:
        ValueError: names the argument that is wrong.
    """
    z0 = sources[0]
    assert z0 is not None
    check_tensor("z0", z0, shape=("B", "C", "H", "W"))
    for name, source in zip(SOURCES[1:], sources[1:], strict=True):
        if source is not None:
            check_tensor(name, source, shape=tuple(z0.shape), device=z0.device)
    if z0[0].numel() > LARGEST_ROW:
        raise ValueError(f"z0 has {z0[0].numel()} elements per sample; at most {LARGEST_ROW} can be indexed")
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
    drawn = [name in draw for name in SOURCES]
    return Point(rows.reshape(-1, 6), sample, path, position, drawn, leading)


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


def check_values(
    sources: Sequence[Tensor | None], rows: Tensor, sample: Tensor, drawn: Sequence[bool]
) -> list[bool]:
    """Of the six sources, whether any row reads it. Called inside an operation, where values may be looked at.

    Raises:
        ValueError: a row reads a source that is neither given nor drawn, or a sample beyond the batch.
    """
    used = rows.ne(0).any(dim=0).tolist()
    for name, source, is_drawn, is_used in zip(SOURCES, sources, drawn, used, strict=True):
        if is_used and source is None and not is_drawn:
            raise ValueError(f"the rows read {name}, which is missing")
    assert sources[0] is not None
    lowest, highest = int(sample.min()), int(sample.max())
    if lowest < 0 or highest >= len(sources[0]):
        raise ValueError(f"sample must lie in 0 ... {len(sources[0]) - 1}, not in {lowest} ... {highest}")
    return used


def combined(
    sources: Sequence[Tensor | None],
    rows: Tensor,
    sample: Tensor,
    path: Tensor,
    position: Tensor | None,
    seed: int,
    drawn: Sequence[bool],
) -> Tensor:
    """The eager twin of what the kernels form in registers: rows applied to the sources, [P, C, H, W] float32."""
    z0 = sources[0]
    assert z0 is not None
    used = check_values(sources, rows, sample, drawn)
    found: list[Tensor | None] = []
    for name, source, is_drawn, is_used in zip(SOURCES, sources, drawn, used, strict=True):
        if not is_used:
            found.append(None)
        elif is_drawn:
            assert position is not None
            key = torch.stack([sample, path if name != "z1" else torch.zeros_like(path)])
            once, inverse = key.unique(dim=1, return_inverse=True)
            noise = normal(seed, STREAMS[name], position[once[0]], once[1], z0.shape[1:], z0.device)
            found.append(noise[inverse])
        else:
            assert source is not None
            found.append(source[sample])
    return combine(rows, found)


def tables(
    rows: Tensor,
    sample: Tensor,
    path: Tensor,
    position: Tensor | None,
    seed: int,
    weight: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The tables of `soar_mega.kernels.source.sources`: groups [G, 8] int64, points [P, 8] float32, in one transfer."""
    change = (sample.diff() != 0) | (path.diff() != 0)
    edge = torch.cat(
        [torch.zeros(1, dtype=torch.int64), change.nonzero().flatten() + 1, torch.tensor([len(sample)])]
    )
    first, end = edge[:-1], edge[1:]
    groups = torch.zeros(len(first), 8, dtype=torch.int64)
    groups[:, 0], groups[:, 1], groups[:, 3], groups[:, 4] = sample[first], path[first], first, end
    if position is not None:
        groups[:, 2] = position[sample[first]]
        groups[:, 5:] = torch.tensor([signed_key(seed, stream) for stream in STREAMS.values()])
    points = torch.zeros(len(rows), 8)
    points[:, :6] = rows
    points[:, 6] = 1.0 if weight is None else weight
    both = torch.cat([groups.flatten(), points.view(torch.int64).flatten()]).to(device, non_blocking=True)
    return both[: groups.numel()].view(-1, 8), both[groups.numel() :].view(torch.float32).view(-1, 8)


def width_class(*tensors: Tensor | None) -> str:
    """The launch table's class of a kernel that streams these."""
    return "16 bit" if any(t is not None and t.element_size() == 2 for t in tensors) else "32 bit"


def signed_key(seed: int, stream: str) -> int:
    """The two key words of a stream as one int64."""
    low, high = stream_key(seed, stream)
    key = high << 32 | low
    return key - 2**64 if key >= 2**63 else key
