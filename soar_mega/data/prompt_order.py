"""Which prompts a collection draws: a pure function of (seed, collection).

The prompts are gone through again and again, each time in another keyed order, so many at a time; what is left of a
pass and would not fill a collection is left out of that pass. So no collection has a prompt twice, and no pass has.
"""

import torch
from torch import Tensor

from soar_mega.data.order import Order, Stretch

STREAM = "prompts"


class PromptOrder:
    """The order of `prompts` prompts, `count` of them in each collection.

    Raises:
        ValueError: a collection wants more prompts than there are.
    """

    def __init__(self, seed: int, prompts: int, count: int, path: object) -> None:
        if count > prompts:
            raise ValueError(
                f"stage.prompts_per_collection is {count} and {path} holds {prompts} different prompts: a collection "
                f"draws each of its prompts once. Set it to {prompts} or less, or give more prompts"
            )
        self._order = Order(seed, {STREAM: prompts})
        self._prompts, self._count = prompts, count

    def of(self, collection: int) -> Tensor:
        """Which prompts [count] int64 a collection draws, the first one being 0."""
        each = self._prompts // self._count
        first = collection // each * self._prompts + collection % each * self._count
        stretch = Stretch(bucket=STREAM, first=first, position=0, count=self._count)
        return torch.from_numpy(self._order.members(stretch))
