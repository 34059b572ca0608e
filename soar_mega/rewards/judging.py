"""Asks a scorer, and holds it to what it promises: one finite number for each image."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from soar_mega.evaluation.scorer import Scorer

log = logging.getLogger(__name__)
SHOWN = 80  # characters of what was given instead of numbers


class BrokenScorer(ValueError):
    """A scorer gives something else than it should, whatever the sample; names it."""


class WorkerError(OSError):
    """A reward worker is gone, too slow, or answers what it should not; names it."""


def judge(
    scorer: Scorer, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, dict[int, str]]:
    """The values [N] float64 of one scorer, NaN where a sample could not be judged, and why not by its index.

    Where judging all images [N, 3, H, W] at once fails, each is judged by itself: one bad sample costs no other.

    Raises:
        BrokenScorer: the scorer gave something else than one number for each image.
        WorkerError: of a scorer that asks a worker.
    """
    if not len(images):
        return torch.zeros(0, dtype=torch.float64), {}
    try:
        given = scorer.score(images, prompts, metadata)
    except (BrokenScorer, WorkerError):
        raise
    except Exception as error:  # scorers are anyone's code and fail in any way they like
        if len(images) == 1:
            log.debug("%s could not judge a sample", scorer.name, exc_info=True)
            return torch.full((1,), torch.nan, dtype=torch.float64), {0: _words(error)}
        return _judge_one_by_one(scorer, images, prompts, metadata)
    if not isinstance(given, Mapping):
        raise BrokenScorer(f"reward {scorer.name} gave {repr(given)[:SHOWN]}, and no values by name")
    if scorer.name not in given:
        raise BrokenScorer(f"reward {scorer.name} gave {sorted(given)}, and no value by its own name")
    values = numbers(scorer.name, given[scorer.name], len(images))
    finite = values.isfinite()
    broken = {i: f"its value is {values[i]}" for i in torch.nonzero(~finite).flatten().tolist()}
    return torch.where(finite, values, torch.nan), broken


def _judge_one_by_one(
    scorer: Scorer, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, dict[int, str]]:
    values = torch.full((len(images),), torch.nan, dtype=torch.float64)
    broken: dict[int, str] = {}
    for i in range(len(images)):
        value, why = judge(scorer, images[i : i + 1], prompts[i : i + 1], metadata[i : i + 1])
        values[i] = value[0]
        broken |= {i: why[0]} if why else {}
    return values, broken


def numbers(name: str, given: Any, count: int) -> Tensor:
    """[count] float64 of a tensor, an array or a list. BrokenScorer where it is none, or not of `count` numbers."""
    try:
        values = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise BrokenScorer(
            f"reward {name} gave {repr(given)[:SHOWN]}: one number for each image is expected"
        ) from error
    if values.shape != (count,):
        raise BrokenScorer(
            f"reward {name} gave values of shape {list(values.shape)} for {count} images: "
            "one number for each image is expected"
        )
    return values


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
