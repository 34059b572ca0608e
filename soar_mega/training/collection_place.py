"""Where a run is among its collections, how many of its samples could not be judged, and what it resumes from."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from soar_mega.config import Recipe
from soar_mega.data.info import DataError
from soar_mega.data.prompt_files import PromptSet
from soar_mega.distributed import is_rank_zero
from soar_mega.stages import CollectingConfig

log = logging.getLogger(__name__)

NAMED = 3  # prompts in a message
RESTART = "start a new run from the weights (checkpoint.load and checkpoint.finetune=true)"


class Place:
    """The place of a run, which its checkpoints keep.

    Attributes:
        samples: of a collection, over all ranks.
        learned_from: samples of one collection, each as often as it is learned from.
        consumed_samples: that were learned from in the whole run, each as often as it was, over all ranks.
        not_judged: of all that were drawn.
    """

    def __init__(self, recipe: Recipe, prompts: PromptSet) -> None:
        config = recipe.stage
        assert isinstance(config, CollectingConfig)
        self.samples = config.samples_per_collection
        self.learned_from = self.samples * config.updates_per_sample
        self.consumed_samples = 0
        self.not_judged = 0
        self._prompts, self._max_failed_share = prompts, recipe.data.max_failed_share
        self._pass = len(prompts) * config.images_per_prompt  # samples of all prompts
        self._settings = {  # what the place in the training sequence depends on
            "train.seed": recipe.train.seed,
            "stage.prompts_per_collection": config.prompts_per_collection,
            "stage.images_per_prompt": config.images_per_prompt,
            "stage.updates_per_sample": config.updates_per_sample,
            "train.global_batch_size": recipe.train.global_batch_size,
        }
        self._drawn_with = {
            "data.resolution": recipe.data.resolution,
            "data.max_sequence_length": recipe.data.max_sequence_length,
        } | {f"stage.{key}": getattr(config, key) for key in config.drawn_with}

    @property
    def collection(self) -> int:
        """The one that is learned from, or comes next."""
        return self.consumed_samples // self.learned_from

    @property
    def position(self) -> int:
        """Of its first sample in the training sequence."""
        return self.collection * self.learned_from

    def count_not_judged(self, totals: Tensor, prompt: Tensor) -> None:
        """Counts the samples of a new collection that have no reward: totals [N], NaN there, of the prompts [N].

        Raises:
            DataError: they are more than `data.max_failed_share` of all that were drawn, or of a pass over all prompts.
        """
        missing = Counter(self._prompts.prompts[i] for i in prompt[totals.isnan()].tolist())
        if not missing:
            return
        self.not_judged += missing.total()
        named = ", ".join(f"{count} of {name!r}" for name, count in missing.most_common(NAMED))
        more = f" and of {len(missing) - NAMED} more prompts" if len(missing) > NAMED else ""
        if is_rank_zero():
            log.warning("samples that could not be judged, left out of learning: %s%s", named, more)
        share = self.not_judged / max((self.collection + 1) * self.samples, self._pass)
        judged = not bool(totals.isnan().all())  # or the report of the collection ends the run, and knows why
        if judged and share > self._max_failed_share:
            raise DataError(
                f"{self.not_judged} samples could not be judged, {share:.2%} of what is drawn "
                f"(data.max_failed_share={self._max_failed_share}). Last ones: {named}{more}; the log says why"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values, equal on all ranks."""
        return {
            "consumed_samples": self.consumed_samples,
            "not_judged": self.not_judged,
            "settings": self._settings | self._drawn_with,
            "prompts": self._prompts.hash(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.consumed_samples, self.not_judged = int(state["consumed_samples"]), int(state["not_judged"])

    def check(self, state: Mapping[str, Any], between: bool) -> None:
        """ValueError where the run cannot go on from a `state`: other prompts, another seed, other sizes, or within a
        collection other settings than its samples were drawn with.

        between: it is one between two collections.
        """
        if "prompts" not in state:
            raise ValueError(f"the run learned from shards, and this recipe draws its own samples: {RESTART}")
        if state["prompts"] != self._prompts.hash():
            raise ValueError(
                f"{self._prompts.path} holds other prompts than the run was started with: give the same data.prompts, "
                f"or {RESTART}"
            )
        saved, now = state["settings"], self._settings | ({} if between else self._drawn_with)
        differing = [key for key, value in now.items() if saved.get(key) != value]
        if differing == ["train.global_batch_size"] and between:
            return
        if differing:
            told = ", ".join(f"{key}={saved.get(key)}, not {now[key]}" for key in differing)
            raise ValueError(
                f"the run was last started with {told}: keep it to resume (train.global_batch_size and what samples "
                "are drawn with may change between two collections)"
            )
