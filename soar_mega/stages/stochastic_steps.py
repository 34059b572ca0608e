"""Which steps of a sampler are stochastic, and which of them are learned from: keyed draws, the same at any layout."""

import torch
from torch import Tensor

from soar_mega.flow import subset, uniform
from soar_mega.stages.collecting_settings import FlowGrpoConfig


def stochastic_steps(config: FlowGrpoConfig, seed: int, position: Tensor) -> Tensor:
    """[B, n] bool for samples at `position` [B] of the training sequence."""
    steps = torch.zeros(len(position), config.sampling_steps, dtype=torch.bool)
    if config.stochastic_steps == "all":
        return ~steps
    return steps.scatter(1, _candidates(config, seed, position), value=True)


def learned_steps(config: FlowGrpoConfig, seed: int, position: Tensor) -> Tensor:
    """[B, T] int64, rising: the stochastic steps that are learned from, never the last one of the sampler."""
    candidates = _candidates(config, seed, position)
    if config.num_learned_steps is None:
        return candidates
    drawn = subset(seed, "learned_steps", position, candidates.shape[1], config.num_learned_steps)
    return candidates.gather(1, drawn)


def _candidates(config: FlowGrpoConfig, seed: int, position: Tensor) -> Tensor:
    """[B, K] int64, rising: the stochastic steps but the last one of the sampler."""
    if config.stochastic_steps.startswith("all"):
        return torch.arange(config.sampling_steps - 1).expand(len(position), -1)
    first, end = config.stochastic_range
    count, key = config.num_stochastic_steps, _key(config, position)
    if config.stochastic_steps == "random":
        return first + subset(seed, "stochastic_steps", key, end - first, count)
    starts = end - first - count + 1
    if config.stochastic_steps == "window":
        start = (starts * uniform(seed, "stochastic_steps", key)[:, 0]).long()
    else:
        stride = config.window_stride
        windows = (starts - 1) // stride + 1
        start = stride * (_collection(config, position) // config.window_interval % windows)
    return first + start[:, None] + torch.arange(count)


def _key(config: FlowGrpoConfig, position: Tensor) -> Tensor:
    """[B] int64, equal for samples that are drawn alike."""
    if config.drawn_per == "sample":
        return position
    collection = _collection(config, position)
    if config.drawn_per == "collection":
        return collection
    within = position % (config.samples_per_collection * config.updates_per_sample)
    prompts = config.prompts_per_collection
    return collection * prompts + within % prompts


def _collection(config: FlowGrpoConfig, position: Tensor) -> Tensor:
    """[B] int64, the number of a sample's collection."""
    return position // (config.samples_per_collection * config.updates_per_sample)
