"""What judges images: a metric of the evaluation, and by the same protocol a reward of RL."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

TOTAL = "total"  # of several scorers, their sum by weight; none has this name


class Scorer(Protocol):
    """Judges images one by one: a value depends on its own image, prompt and metadata alone, not on the batch.

    Attributes:
        name: as it is asked for and reported.
        version: of the formula; values of different versions are not compared.
        weights_hash: SHA-256 over the files that it read, "" where it reads none.
    """

    name: str
    version: str
    weights_hash: str

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """Values [N] float64 on the CPU by name, the scorer's own name first; more is better.

        Args:
            images: [N, 3, H, W] float32 in [0, 1].
            metadata: of each prompt, what its file says beside the prompt; {} where that is nothing.

        Raises:
            ValueError: a prompt or its metadata is not of a kind that can be judged; names it.
        """
        ...


@runtime_checkable
class Particular(Protocol):
    """A scorer that can judge some prompts alone, and says so before there is an image."""

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """ValueError where a prompt or its metadata is not of a kind that can be judged; names it."""
        ...
