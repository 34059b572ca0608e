"""What a layer hands to the next one: tokens, or the last sum of a stream left open.

A layer ends with a sum, residual + gate (branch + bias), and the next begins with its norm. `adaln` does both in one
pass over the tokens: of two layers that follow each other, the first leaves the sum to the second.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class OpenSum(NamedTuple):
    """residual + gate (branch + bias), not added up yet; in the order of the arguments of `adaln`."""

    residual: Tensor  # [S, B, H]
    branch: Tensor  # [S, B, H]
    gate: Tensor  # [B, H]
    bias: Tensor | None  # [H]; None: it is in the branch


Tokens = Tensor | OpenSum


def each(function: Callable[[Tensor], Tensor], tokens: Tokens | None) -> Tokens | None:
    """The same with `function` of every tensor."""
    if isinstance(tokens, OpenSum):
        residual, branch, gate, bias = tokens
        return OpenSum(
            function(residual), function(branch), function(gate), None if bias is None else function(bias)
        )
    return None if tokens is None else function(tokens)


def tensors_of(*streams: Tokens | None) -> list[Tensor | None]:
    """All tensors of streams, in one list."""
    return [x for stream in streams for x in (stream if isinstance(stream, OpenSum) else (stream,))]
