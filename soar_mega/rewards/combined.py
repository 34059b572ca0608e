"""Several rewards at once: the values of each by name, and their weighted sum."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from soar_mega.evaluation.scorer import TOTAL, Particular, Scorer
from soar_mega.rewards.client import WorkerScorer
from soar_mega.rewards.judging import judge

log = logging.getLogger(__name__)
SAME = 1e-3  # relative: a model in bf16 on a GPU does not repeat its values to the last bit


class Rewards:
    """Scorers with weights. Make it by `make_rewards`.

    Attributes:
        names: of the rewards, without "total".
        weights: of each in the total.
    """

    def __init__(self, scorers: Sequence[Scorer], weights: Sequence[float]) -> None:
        self.names = tuple(scorer.name for scorer in scorers)
        self.weights = dict(zip(self.names, weights, strict=True))
        self._scorers = tuple(scorers)
        self._seen_alone: set[str] = set()  # names of those that have judged a sample by itself too
        self._not_judged: Counter[str] = Counter()  # samples since the start
        self._constant: Counter[str] = Counter()  # collections since the start
        self._last_words: dict[str, str] = {}

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """ValueError where a reward that counts says, before there is an image, that it cannot judge such a prompt."""
        for scorer in self._scorers:
            if isinstance(scorer, Particular) and self.weights[scorer.name]:
                scorer.check(prompt, metadata)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """The values of each reward by its name, and "total", their sum by weight: [N] float64 on the CPU.

        A value does not depend on the other samples. Where a reward could not judge a sample its value is NaN, and the
        total of the sample with it, unless the weight is 0: such a sample is to be left out of learning. That is logged
        and counted.

        Args:
            images: [N, 3, H, W] in [0, 1]; one that is not finite is not judged.
            metadata: of each prompt, {} where there is nothing.

        Raises:
            ValueError: a reward gave something else than one number for each image.
            OSError: a reward worker is gone, too slow, or answers what it should not; names it.
        """
        assert images.ndim == 4 and images.shape[1] == 3, f"images are [N, 3, H, W], not {list(images.shape)}"
        assert len(images) == len(prompts) == len(metadata), (len(images), len(prompts), len(metadata))
        images = images.detach().float()
        whole = images.isfinite().flatten(1).all(dim=1).tolist()
        chosen = [i for i, finite in enumerate(whole) if finite]
        if len(chosen) < len(images):
            images, prompts, metadata = (
                images[chosen],
                [prompts[i] for i in chosen],
                [metadata[i] for i in chosen],
            )
        values = {}
        for scorer in self._scorers:
            judged, broken = judge(scorer, images, prompts, metadata)
            if len(images) > 1 and scorer.name not in self._seen_alone:
                self._seen_alone.add(scorer.name)
                alone, _ = judge(scorer, images[:1], prompts[:1], metadata[:1])
                _compare(scorer.name, float(alone[0]), float(judged[0]))
            values[scorer.name] = torch.full((len(whole),), torch.nan, dtype=torch.float64)
            values[scorer.name][chosen] = judged
            why = {i: "the image is not finite" for i, finite in enumerate(whole) if not finite}
            self._tell(scorer.name, len(whole), why | {chosen[i]: words for i, words in broken.items()})
        counted = [name for name in self.names if self.weights[name]]
        values[TOTAL] = torch.stack([self.weights[name] * values[name] for name in counted]).sum(dim=0)
        return values

    def examine(self, collection: Mapping[str, Tensor]) -> None:
        """Look at what `score` gave for a whole collection, and warn of a reward that tells no sample from another.

        Raises:
            ValueError: a reward that counts could not judge a single sample, or all of them together none.
        """
        for name in self.names:
            values = collection[name][collection[name].isfinite()]
            if not len(values) and self.weights[name]:
                raise ValueError(
                    f"reward {name} could not judge one of the {len(collection[name])} samples of a collection"
                    f"{f': {self._last_words[name]}' if name in self._last_words else ''}"
                )
            if self.weights[name] and len(values) > 1 and values.min() == values.max():
                self._constant[name] += 1
                log.warning(
                    "reward %s is %g for all samples of a collection: there is nothing to learn from it "
                    "(so far in %d collections)",
                    name,
                    values[0],
                    self._constant[name],
                )
        if not bool(collection[TOTAL].isfinite().any()):  # each judged others
            why = "; ".join(f"{name}: {words}" for name, words in self._last_words.items())
            raise ValueError(
                f"none of the {len(collection[TOTAL])} samples of a collection could be judged by all rewards "
                f"({why}): there is nothing to learn from"
            )

    def close(self) -> None:
        """Ends what another thread is asking a worker, which raises OSError there: or a process would end after it."""
        for scorer in self._scorers:
            if isinstance(scorer, WorkerScorer):
                scorer.close()

    def _tell(self, name: str, count: int, broken: Mapping[int, str]) -> None:
        if not broken:
            return
        self._not_judged[name] += len(broken)
        self._last_words[name] = next(iter(broken.values()))
        log.warning(
            "reward %s could not judge %d of %d samples, which are left out of learning (%d so far): %s",
            name,
            len(broken),
            count,
            self._not_judged[name],
            self._last_words[name],
        )


def _compare(name: str, alone: float, among_others: float) -> None:
    """Warns where a sample judged by itself is worth something else than among others."""
    if abs(alone - among_others) > SAME * max(abs(alone), abs(among_others)):
        log.warning(
            "reward %s gives a sample %g by itself and %g among others: a run at another layout learns something else",
            name,
            alone,
            among_others,
        )
