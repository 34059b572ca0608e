"""What a reward worker answers, in the forms of UniRL's service (/score) and of Flow-Factory's server (/compute).

A sample gets a score or the reason why it has none; one that is damaged costs no other.
"""

import json
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soar_mega.evaluation.scorer import Scorer
from soar_mega.rewards.judging import BrokenScorer, WorkerError, judge
from soar_mega.rewards.picture_files import from_base64
from soar_mega.user_files import is_text

Json = dict[str, Any]


class BadRequest(ValueError):
    """A request that cannot be answered; says why. `status` is that of HTTP."""

    def __init__(self, words: str, status: int = 400) -> None:
        super().__init__(words)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one request: bytes of its body, images in it, and pixels of all of them when decoded."""

    body: int = 256 * 2**20
    images: int = 64
    pixels: int = 64 * 2**20


@dataclass(frozen=True)
class Sample:
    image: Tensor | None  # [3, H, W] uint8
    prompt: str
    metadata: Json
    damage: str = ""  # why there is no image


class Worker:
    """Scorers by name, asked by one request at a time: a scorer need not be safe for threads, or have room for two."""

    def __init__(self, scorers: Sequence[Scorer], limits: Limits, keys: Sequence[str] = ()) -> None:
        """keys: what the scorers are called in a recipe, so that a client may ask for them by that."""
        self.scorers = {scorer.name: scorer for scorer in scorers}
        self._keys = dict(zip(keys, self.scorers))
        self.limits = limits
        self._one_at_a_time = threading.Lock()

    def health(self) -> Json:
        """As UniRL's service says it, and what the values are made by."""
        return {
            "status": "ok",
            "rewards": {name: ["ready"] for name in self.scorers},
            "keys": self._keys,
            "scorers": {
                name: {"version": scorer.version, "weights_hash": scorer.weights_hash}
                for name, scorer in self.scorers.items()
            },
        }

    def score(self, body: bytes) -> Json:
        """{"results": [{name: {name: value}}], "errors": [{name: words}]}, one of each for every request.

        Raises:
            BadRequest: the body is not {"requests": [{"history": [{"text", "image_b64"}], "required_rewards": [name],
                "metadata": {} or null}]}, has too many images, or asks for a reward that is not served.
        """
        requests = _list(_object(body), "requests")
        self._check_count(len(requests))
        asked, wanted = [], []
        for request in requests:
            if not isinstance(request, dict):
                raise BadRequest("each of requests must be an object")
            names = _list(request, "required_rewards")
            if unknown := [name for name in names if name not in self._names()]:
                raise BadRequest(f"unknown reward {unknown[0]!r}, served are {self._names()}")
            turns = _list(request, "history")
            if not turns or not isinstance(turns[-1], dict):
                raise BadRequest("history must hold at least one turn, an object")
            asked.append((turns[-1].get("image_b64"), turns[-1].get("text"), request.get("metadata")))
            wanted.append(names)
        samples = self._samples(asked)
        results: list[dict[str, dict[str, float]]] = [{} for _ in samples]
        errors: list[dict[str, str]] = [{} for _ in samples]
        for name in self.scorers:
            chosen = [i for i, names in enumerate(wanted) if name in names]
            for i, given in zip(chosen, self._judge(name, [samples[i] for i in chosen])):
                if isinstance(given, str):
                    errors[i][name] = given
                else:
                    results[i][name] = {name: given}
        return {"results": results, "errors": errors}

    def compute(self, body: bytes, name: str) -> Json:
        """{"rewards": [value]}; where one is null, "errors" says why, and "error" is what Flow-Factory's client raises.

        Raises:
            BadRequest: the body is not {"prompt": [text], "image": [base64], "metadata": [{}] or null}, or has too many
                images.
        """
        content = _object(body)
        if content.get("video"):
            raise BadRequest("videos are not judged here: send images")
        images, prompts = _list(content, "image"), _list(content, "prompt")
        self._check_count(len(images))
        metadata = content.get("metadata")
        metadata = [None] * len(images) if metadata is None else _list(content, "metadata")
        if not len(images) == len(prompts) == len(metadata):
            raise BadRequest(f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} of metadata")
        given = self._judge(name, self._samples(zip(images, prompts, metadata)))
        words = [each if isinstance(each, str) else None for each in given]
        answer: Json = {"rewards": [None if isinstance(each, str) else each for each in given]}
        if failed := [each for each in words if each is not None]:
            answer |= {
                "errors": words,
                "error": f"{len(failed)} of {len(given)} images were not judged: {failed[0]}",
            }
        return answer

    def _samples(self, asked: Iterable[tuple[Any, Any, Any]]) -> list[Sample]:
        """Of image, prompt and metadata each; all images together have no more pixels than a request may."""
        samples, room = [], self.limits.pixels
        for image, prompt, metadata in asked:
            samples.append(_sample(image, prompt, metadata, room))
            room -= _pixels(samples[-1])
        return samples

    def _judge(self, name: str, samples: Sequence[Sample]) -> list[float | str]:
        """The value of each sample, or why it has none. Images of one size are judged together."""
        given: list[float | str] = [sample.damage for sample in samples]
        sizes: dict[torch.Size, list[int]] = defaultdict(list)
        for i, sample in enumerate(samples):
            if sample.image is not None:
                sizes[sample.image.shape].append(i)
        for chosen in sizes.values():
            images = torch.stack([image for i in chosen if (image := samples[i].image) is not None]) / 255
            prompts, metadata = [samples[i].prompt for i in chosen], [samples[i].metadata for i in chosen]
            try:
                with self._one_at_a_time, torch.no_grad():
                    values, broken = judge(self.scorers[name], images, prompts, metadata)
            except (BrokenScorer, WorkerError) as error:
                values, broken = torch.zeros(len(chosen)), dict.fromkeys(range(len(chosen)), str(error))
            for k, i in enumerate(chosen):
                given[i] = broken.get(k, float(values[k]))
        return given

    def _names(self) -> list[str]:
        return list(self.scorers)

    def _check_count(self, images: int) -> None:
        if images > self.limits.images:
            raise BadRequest(f"{images} images in a request, at most {self.limits.images} are taken", 413)


def _object(body: bytes) -> Json:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadRequest("the body must be a JSON object")
    return content


def _list(content: Json, key: str) -> list[Any]:
    if not isinstance(content.get(key), list):
        raise BadRequest(f"{key} must be a list")
    return content[key]  # type: ignore[no-any-return]


def _sample(image: Any, prompt: Any, metadata: Any, most_pixels: int) -> Sample:
    if not isinstance(prompt, str) or not is_text(prompt):
        raise BadRequest("a prompt must be text")
    if metadata is not None and not isinstance(metadata, dict):
        raise BadRequest("the metadata of a prompt must be an object or null")
    if not isinstance(image, str):
        return Sample(None, prompt, metadata or {}, "there is no image: it is expected as base64 of a PNG")
    try:
        return Sample(from_base64(image, most_pixels), prompt, metadata or {})
    except ValueError as error:
        return Sample(None, prompt, metadata or {}, str(error))


def _pixels(sample: Sample) -> int:
    return 0 if sample.image is None else sample.image.shape[1] * sample.image.shape[2]
