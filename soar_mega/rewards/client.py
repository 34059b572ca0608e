"""A reward that a worker computes elsewhere, in the form of UniRL's /score or of Flow-Factory's /compute.

Images travel as PNG in base64, so a worker sees them rounded to 8 bits.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from soar_mega.rewards.asking import SHOWN, Patience, Peer
from soar_mega.rewards.picture_files import to_base64

log = logging.getLogger(__name__)
BATCH, PIXELS = 16, 2**25  # images of a request, and pixels of all of them
DEFAULT = Patience()

# A value, or why there is none.
Given = float | str


class WorkerScorer:
    """Asks a worker, and takes nothing that it says on trust.

    Attributes:
        name: of the reward, as the worker knows it, and says where it is asked for by what `serve-reward` was told;
            NAME/PART is one of several values that it gives under NAME.
    """

    weights_hash = ""

    def __init__(self, key: str, patience: Patience = DEFAULT) -> None:
        """Waits for the worker.

        Args:
            key: http://host:port/score#NAME, http://host:port/compute, or file:PATH#NAME, where
                `soar-mega serve-reward --url-file PATH` writes the address.

        Raises:
            ValueError: the key is not of this form, or the worker has no such reward.
            WorkerError: the worker is not there, or refuses.
        """
        place, _, name = key.partition("#")
        self._compute = place.endswith("/compute")
        if not self._compute and not place.startswith("file:"):
            if not place.endswith("/score"):
                raise ValueError(f"{key}: the address of a reward worker ends in /score#NAME or /compute")
            place = place.removesuffix("/score")
        if not self._compute and not name:
            raise ValueError(f"{key}: which reward of that worker? put #NAME after it")
        self._peer = Peer(place.removesuffix("/compute"), patience)
        self.name = name or "compute"
        self.version = self._look_up()

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """As `Scorer.score`, NaN where the worker could not judge an image.

        Raises:
            WorkerError: the worker is gone, too slow, or gives something else than one number for each image.
        """
        ask = self._ask_compute if self._compute else self._ask_score
        given: list[Given] = []
        size = max(1, min(BATCH, PIXELS // max(1, images.shape[2] * images.shape[3])))
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            given += ask([to_base64(image) for image in images[part]], prompts[part], metadata[part])
        if why := [each for each in given if isinstance(each, str)]:
            log.warning("reward worker %s: %s", self._peer.place, why[0][:SHOWN])
        values = [torch.nan if isinstance(each, str) else each for each in given]
        return {self.name: torch.tensor(values, dtype=torch.float64)}

    def close(self) -> None:
        """Ends what another thread is asking, which raises WorkerError there."""
        self._peer.close()

    def _ask_score(
        self, pictures: Sequence[str], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Given]:
        name, _, part = self.name.partition("/")
        requests = [
            {
                "history": [{"text": prompt, "image_b64": picture}],
                "required_rewards": [name],
                "metadata": dict(more) or None,
            }
            for picture, prompt, more in zip(pictures, prompts, metadata, strict=True)
        ]
        answer = self._object(self._peer.post("/score", {"requests": requests}))
        results = self._list(answer, "results", len(pictures))
        errors = self._list(answer, "errors", len(pictures)) if answer.get("errors") else [{}] * len(pictures)
        given: list[Given] = []
        for result, error in zip(results, errors):
            values = result.get(name) if isinstance(result, dict) else None
            if isinstance(values, dict) and values and part in ("", *values):
                given.append(self._number(values[part] if part else next(iter(values.values()))))
            elif isinstance(error, dict) and error.get(name):
                given.append(str(error[name]))
            else:
                raise self._peer.error(f"it gave neither a value nor an error for {self.name}", result)
        return given

    def _ask_compute(
        self, pictures: Sequence[str], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Given]:
        content = {"prompt": prompts, "image": pictures, "metadata": [dict(more) for more in metadata]}
        answer = self._object(self._peer.post("/compute", content))
        if "rewards" not in answer and answer.get("error"):
            raise self._peer.error("it failed", answer["error"])
        values = self._list(answer, "rewards", len(pictures))
        errors = (
            self._list(answer, "errors", len(pictures)) if answer.get("errors") else [None] * len(pictures)
        )
        return [
            str(why) if why and value is None else self._number(value) for value, why in zip(values, errors)
        ]

    def _number(self, value: Any) -> Given:
        if value is None:
            return "it gave no value and no reason"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._peer.error("it gave something else than a number", value)
        try:
            return float(value)
        except OverflowError:
            return "its value is too large"

    def _list(self, answer: Mapping[str, Any], key: str, count: int) -> list[Any]:
        values = answer.get(key)
        if not isinstance(values, list) or len(values) != count:
            length = f"{len(values)} entries" if isinstance(values, list) else "no list"
            raise self._peer.error(f"{key} has {length} where {count} are expected", answer)
        return values

    def _object(self, body: bytes) -> dict[str, Any]:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self._peer.error("its answer is not valid JSON", body) from error
        if not isinstance(content, dict):
            raise self._peer.error("its answer is no JSON object", content)
        return content

    def _look_up(self) -> str:
        """Waits until the worker is there; the version of its reward, where it tells."""
        answer = self._peer.get("/health")
        try:
            health = json.loads(answer)
            served, facts, keys = health.get("rewards"), health.get("scorers"), health.get("keys")
        except (ValueError, RecursionError, AttributeError):
            return "of a worker"  # it is there, and that is all it says
        if isinstance(keys, dict):
            self.name = str(keys.get(self.name, self.name))
        name = self.name.partition("/")[0]
        if not self._compute and isinstance(served, dict) and name not in served:
            raise ValueError(f"the worker {self._peer.place} has no reward {name}, it has {sorted(served)}")
        mine = facts.get(name) if isinstance(facts, dict) else None
        return str(mine["version"]) if isinstance(mine, dict) and "version" in mine else "of a worker"
