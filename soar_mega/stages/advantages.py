"""Advantages: how much better a sample is than the others of its prompt, in standard deviations.

In float64, where the published trainers agree to rounding. A reward that is NaN belongs to a sample that could not be
judged: it counts nowhere, and its advantage is NaN.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from soar_mega.evaluation.scorer import TOTAL
from soar_mega.stages.collecting_settings import CollectingConfig


@dataclass(frozen=True)
class Groups:
    """What the G prompts of a collection say of its rewards.

    Attributes:
        index: [N] int64, the group of each sample.
        mean: [G] float64, of the rewards of a group; NaN where none of its samples was judged.
        spread: [G] float64, their standard deviation, 0 exactly where all are equal.
    """

    index: Tensor
    mean: Tensor
    spread: Tensor


def groups(rewards: Tensor, prompt: Tensor, unbiased: bool = False) -> Groups:
    """Of rewards [N] float64 with the samples' prompts [N] int64; NaN counts nowhere.

    unbiased: a variance is divided by n - 1, not n.
    """
    _, index = prompt.unique(return_inverse=True)
    size = int(index.max()) + 1 if len(index) else 0
    judged = ~rewards.isnan()
    known = torch.where(judged, rewards, 0.0)
    count, total = _sums(judged.double(), index, size), _sums(known, index, size)
    mean = total / count
    squares = torch.where(judged, (rewards - mean[index]).square(), 0.0)
    variance = _sums(squares, index, size) / (count - 1 if unbiased else count).clamp(min=1)
    # a mean of equal numbers may be another number
    low = torch.full_like(total, torch.inf).scatter_reduce(0, index[judged], rewards[judged], "amin")
    high = torch.full_like(total, -torch.inf).scatter_reduce(0, index[judged], rewards[judged], "amax")
    equal = low == high
    return Groups(index, torch.where(equal, low, mean), torch.where(equal, 0.0, variance).sqrt())


def advantages_of_all(rewards: Mapping[str, Tensor], prompt: Tensor, config: CollectingConfig) -> Tensor:
    """[N] float64 of samples with several rewards: of their total, or of each by itself, weighted and added up.

    Args:
        rewards: by name, [N] float64 each: those of `config.rewards` in its order, and TOTAL.
        prompt, config: as for `advantages`.
    """
    if config.advantages_of == "total":
        return advantages(rewards[TOTAL], prompt, config)
    missing, found = rewards[TOTAL].isnan(), torch.zeros_like(rewards[TOTAL])
    each = [values for name, values in rewards.items() if name != TOTAL]
    for weight, values in zip(config.rewards.values(), each, strict=True):
        if weight:
            found += weight * advantages(values.masked_fill(missing, torch.nan), prompt, config)
    return found


def advantages(rewards: Tensor, prompt: Tensor, config: CollectingConfig) -> Tensor:
    """(reward - mean of its prompt) / standard deviation, [N] float64, not clipped.

    Args:
        rewards: [N] float64 of a whole collection; prompt: [N] int64, equal for a group.
        config: says which standard deviation, and how it is kept from 0.
    """
    found = groups(rewards, prompt, config.std_unbiased)
    spread = found.spread[found.index]
    if config.std_over == "collection":
        spread = groups(rewards, torch.zeros_like(prompt), config.std_unbiased).spread
    epsilon = config.std_epsilon
    if config.std_epsilon_use == "added":
        divisor = spread + epsilon
    elif config.std_epsilon_use == "in_root":
        divisor = (spread.square() + epsilon).sqrt()
    else:
        divisor = spread.clamp(min=epsilon)
    above_mean = rewards - found.mean[found.index]
    return torch.where(above_mean == 0, 0.0, above_mean / divisor)


def _sums(values: Tensor, index: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64).index_add(0, index, values.double())
