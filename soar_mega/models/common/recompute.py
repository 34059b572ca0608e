"""Modules whose forward is run again in backward, in place of keeping what it computed."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def run(function: Any, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, of which only arguments and results are kept for the backward.

    No random generator is restored: nothing in a model draws from one.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def recomputed(module: type) -> type:
    """A class of modules like `module` that compute their forward again in backward."""

    class Recomputed(module):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return run(super().forward, *args, **kwargs)

    return Recomputed
