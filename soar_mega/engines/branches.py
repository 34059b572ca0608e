"""Which query each row of an answer pass asks, and by which branch.

A forward has room for `size` queries with both branches. Where only some queries want their unconditional velocity,
those come first, in such forwards, and the others fill theirs with twice as many: all forwards have one shape, and
nobody asks what nobody reads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from soar_mega.stages.points import Queries


@dataclass(frozen=True)
class Branches:
    """The rows of `count` forwards, made on the CPU.

    Attributes:
        size: v_uncond of a query lies so many rows behind its v_cond.
        query: [count, rows] int64; the last one stands again where a forward is filled up.
        unconditional: [count, rows] bool.
        row: [Q] int64, where v_cond of a query lies, if a forward's answer is `stride` rows.
        stride: the rows of a forward, and as many more that the v_uncond of a row which has none lies on an answer.
        asked: whether v_uncond is asked of any.
    """

    size: int
    query: Tensor
    unconditional: Tensor
    row: Tensor
    stride: int
    asked: bool

    @property
    def count(self) -> int:
        """Forwards."""
        return len(self.query)

    @property
    def rows(self) -> int:
        """Rows of a forward."""
        return self.query.shape[1]


def branches_of(queries: Queries, most: int) -> Branches:
    """How queries are asked in forwards of at most `most` of them with both branches."""
    total, wanted = len(queries), queries.unconditional
    size = min(most, total)
    if isinstance(wanted, bool):
        return _in_two_parts(torch.arange(total), total if wanted else 0, size, size * (1 + wanted), 0)
    # small enough that what fills up the last forward of each part is little
    size = min(size, -(-total // 4))
    order = torch.cat([wanted.nonzero().flatten(), (~wanted).nonzero().flatten()])
    return _in_two_parts(order, int(wanted.sum()), size, 2 * size, size)


def _in_two_parts(order: Tensor, both: int, size: int, rows: int, margin: int) -> Branches:
    """The first `both` of the queries in their `order` by both branches, the rest by one."""
    paired = min(-(-both // size) * size, len(order))  # the last forward of these is filled up with others
    first, rest = _cut(order[:paired], size), _cut(order[paired:], rows)
    query = torch.cat([first.repeat(1, rows // size), rest])
    unconditional = torch.zeros_like(query, dtype=torch.bool)
    unconditional[: len(first), size:] = True
    place = torch.arange(len(order))
    stride, behind = rows + margin, place - paired
    row = torch.empty_like(order)
    row[order] = torch.where(
        behind < 0,
        place // size * stride + place % size,
        (len(first) + behind // rows) * stride + behind % rows,
    )
    return Branches(size, query, unconditional, row, stride, both > 0 or margin > 0)


def _cut(order: Tensor, rows: int) -> Tensor:
    """[n] -> [forwards, rows], the last of them again where one is filled up."""
    forwards = -(-len(order) // rows)
    if not forwards:
        return order.new_empty(0, rows)
    return order[torch.arange(forwards * rows).clamp(max=len(order) - 1)].view(forwards, rows)
