"""What stands for CUDA graphs on a CPU: the work of a recording, done again at each replay."""

from collections.abc import Callable

import torch

from soar_mega.models.common.layer_graphs import WARM_UP


class RepeatedWork:
    """As with a graph, recording the work leaves the sums of gradients as they are."""

    def __init__(self, engine) -> None:
        self._sums = [p.main_grad for p in engine.parameters.values() if p.requires_grad]

    def warm_up(self, work: Callable[[], None]) -> None:
        before = [total.clone() for total in self._sums]
        for _ in range(WARM_UP):
            work()
        assert all(torch.equal(a, b) for a, b in zip(self._sums, before, strict=True)), (
            "a warm-up left traces"
        )

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        before = [total.clone() for total in self._sums]
        work()
        for total, kept in zip(self._sums, before, strict=True):
            total.copy_(kept)
        return work
