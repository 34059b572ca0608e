"""Which parameters are trained, and how fast: patterns over global parameter names."""

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch.nn import Parameter

from soar_mega.config import OptimizerConfig


def freeze(
    parameters: dict[str, Parameter],
    config: OptimizerConfig,
    candidates: Callable[[str], bool] = lambda name: True,
) -> None:
    """Take the parameters that match optimizer.frozen out of training. Collective over the pipeline.

    Args:
        candidates: tells by its name whether a parameter can be trained at all.

    Raises:
        ValueError: a pattern of optimizer.frozen or optimizer.lr_multipliers matches nothing, or nothing is left to
            train.
    """
    names = [name for name in _all_names(parameters) if candidates(name)]
    for key, patterns in (("frozen", config.frozen), ("lr_multipliers", list(config.lr_multipliers))):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"optimizer.{key}: {pattern!r} matches no parameter. {_near(pattern, names)}"
                )
    if all(_matches(name, config.frozen) for name in names):
        raise ValueError(f"optimizer.frozen: {config.frozen} leaves no parameter to train")
    for name, parameter in parameters.items():
        parameter.requires_grad_(candidates(name) and not _matches(name, config.frozen))


def learning_rate_factors(names: Iterable[str], config: OptimizerConfig) -> dict[str, float]:
    """optimizer.lr_multipliers by parameter name, for those that have one; the last matching pattern counts."""
    names = list(names)
    return {
        name: factor
        for pattern, factor in config.lr_multipliers.items()
        for name in names
        if fnmatchcase(name, pattern)
    }


def learning_rate_overrides(
    parameters: dict[str, Parameter], config: OptimizerConfig
) -> dict[ParamKey, dict[str, float]]:
    """megatron's overrides of parameter groups for optimizer.lr_multipliers."""
    factors = {
        id(parameters[name]): factor for name, factor in learning_rate_factors(parameters, config).items()
    }

    def key(factor: float) -> ParamKey:
        members = {member for member, own in factors.items() if own == factor}
        return ParamKey(
            predicate=ParamPredicate(f"lr_mult={factor}", lambda parameter: id(parameter) in members)
        )

    return {key(factor): {"lr_mult": factor} for factor in sorted(set(config.lr_multipliers.values()))}


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _all_names(parameters: dict[str, Parameter]) -> list[str]:
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(stages, list(parameters), group=group)
    return [name for stage in stages for name in stage]


def _near(pattern: str, names: list[str]) -> str:
    depth = pattern.count(".") + 1
    heads = list(dict.fromkeys(".".join(name.split(".")[:depth]) for name in names))
    near = difflib.get_close_matches(pattern, heads, n=5, cutoff=0.4) or heads[:5]
    return f"Names begin like: {', '.join(near)}"
