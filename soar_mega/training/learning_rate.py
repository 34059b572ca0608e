"""The learning rate of a step: a pure function of the iteration, so that resuming needs no scheduler state."""

import math

from soar_mega.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, iteration: int, train_iters: int) -> float:
    """Learning rate of the step that follows `iteration` finished steps.

    Warm-up is linear and reaches `lr` on its last step; its first step already has lr / lr_warmup_iters, because a step
    at learning rate zero would be wasted. Then `lr` is held until `lr_decay_start`, and falls to `min_lr` at
    `lr_decay_iters`.

    Args:
        iteration: finished steps, from 0.
        train_iters: length of the run; the decay ends there unless lr_decay_iters says otherwise.
    """
    warmup = config.lr_warmup_iters
    if iteration < warmup:
        return config.lr * (iteration + 1) / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    start = max(warmup, config.lr_decay_start or 0)
    end = config.lr_decay_iters or train_iters
    progress = min(max(iteration - start, 0) / max(end - start, 1), 1.0)
    if config.lr_decay_style == "cosine":
        kept = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.lr_decay_style == "linear":
        kept = 1.0 - progress
    else:
        raise ValueError(
            f"optimizer.lr_decay_style: {config.lr_decay_style!r} is unknown; choose constant, cosine or linear"
        )
    return config.min_lr + (config.lr - config.min_lr) * kept
