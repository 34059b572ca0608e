"""Samples on their way to rewards: decoded and judged on one rank of each replica, while the next ones are drawn."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega.data.ranks import agree
from soar_mega.phases import phases

if TYPE_CHECKING:
    from soar_mega.data.vae import Decoder
    from soar_mega.rewards import Rewards

Values = dict[str, Tensor]  # by reward


class Judge:
    """Decodes and judges in a thread of its own, one piece after the other."""

    def __init__(self, decoder: "Decoder", rewards: "Rewards") -> None:
        self.decoder, self.rewards = decoder, rewards
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._waiting: list[tuple[Tensor, Future[Values]]] = []

    def submit(
        self, place: Tensor, latents: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> None:
        """Have samples judged: latents [B, C, H, W], which are at `place` [B] of the collection."""
        self._waiting.append((place, self._pool.submit(self._judge, latents, prompts, metadata)))

    def values(self, count: int) -> Values:
        """Those of all that was submitted, at their places among `count`, zero elsewhere. Waits for them.

        Raises:
            ValueError, OSError: as `Rewards.score`.
        """
        try:
            found = [(place, future.result()) for place, future in self._waiting]
        finally:
            self.drop()
        names = list(found[0][1]) if found else []
        values = {name: torch.zeros(count, dtype=torch.float64) for name in names}
        for place, judged in found:
            for name, value in judged.items():
                values[name][place] = value
        return values

    def drop(self) -> None:
        """Forgets what was submitted; what is being judged comes to its end unheard."""
        for _, future in self._waiting:
            future.cancel()
        self._waiting = []

    def close(self) -> None:
        """Ends the thread when it has done what it is doing."""
        self.rewards.close()  # or a worker that does not answer would be waited for
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _judge(self, latents: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Values:
        return self.rewards.score(self.decoder.decode(latents), prompts, metadata)


def rewards_of_all(judge: Judge | None, count: int) -> Values:
    """The rewards of a whole collection [count] float64 by name, on every rank. Collective over the world.

    Args:
        judge: of this rank, None where it has none.

    Raises:
        DataError: on all ranks alike, when a sample could not be judged for a reason that ends the run.
    """
    mine, failure = Values(), None
    if judge is not None:
        try:
            mine = judge.values(count)
        except (ValueError, OSError, RuntimeError) as error:
            failure = str(error)
    agree({}, 0, failure)
    names: list[Any] = [list(mine) or None]
    dist.broadcast_object_list(names, src=0)  # rank 0 judges for the first replica
    with phases.waiting():
        table = torch.stack([mine[name] for name in names[0]]) if mine else None
        if table is None:
            table = torch.zeros(len(names[0]), count, dtype=torch.float64)
        dist.all_reduce(table)  # each place has a value on one rank and zero on the others
    return dict(zip(names[0], table, strict=True))
