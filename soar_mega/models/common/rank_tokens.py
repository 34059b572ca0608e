"""How many tokens of one point a rank has."""

from dataclasses import dataclass

from soar_mega.models.common.sizes import Sizes


@dataclass(frozen=True)
class RankTokens:
    """Of one point on one rank, (text, image): where every rank has whole vectors, and where it has some features.

    Attributes:
        whole: outside attention and the MLP; cut over CP, and over TP with sequence parallelism.
        cut: elements, in tokens of the full hidden size, of what is cut over TP and CP, while a stream is padded.
        attending: the same without padding.
        copied: of `cut`, where attention's result is copied once more, to be padded or exchanged.
    """

    whole: tuple[float, float]
    cut: tuple[float, float]
    attending: tuple[float, float]
    copied: tuple[float, float]

    def inputs(self, sizes: Sizes, item: int) -> float:
        """Bytes of what enters a layer."""
        return (sum(self.whole) + 1) * sizes.hidden_size * item
