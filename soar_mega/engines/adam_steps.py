"""How many steps Adam has taken, in a checkpoint: whichever Adam wrote it, and whichever goes on from it.

torch's AdamW counts in the state of each tensor, which megatron's plain optimizers save as `common_step` and its
distributed one in the parameter groups. The FusedAdam of Transformer Engine, of apex and of platform.py counts in the
parameter groups, with a number or a tensor. Nothing else of a saved group is used: all of it is the recipe's.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist


@contextlib.contextmanager
def started(optimizers: Iterable[Any]) -> Iterator[None]:
    """Has megatron's optimizers hold their moments, so that they can be saved before the first step: they are zero.

    Taken away again: to torch's Adam a state without a count of steps is none to go on from.
    """
    fresh = [one for one in optimizers if one.get_parameters() and not one.optimizer.state]
    for one in fresh:
        one.init_state_fn(one.optimizer, one.config)
    try:
        yield
    finally:
        for one in fresh:
            one.optimizer.state.clear()


def kept_steps(adam: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint keeps of Adam beside its tensors, in the form of megatron's distributed optimizer."""
    counts = [holder.get("step", 0) for holder in (*adam.param_groups, *adam.state.values())]
    return {"optimizer": {"param_groups": [{"step": max(map(int, counts))}]}}


def saved_steps(state: dict[str, Any]) -> int:
    """The steps behind the moments in what a checkpoint holds of any of megatron's optimizers."""
    adam = state.get("optimizer", state)
    counts = [group.get("step", 0) for group in adam["param_groups"]]
    counts.append(adam.get("state", {}).get("common_step", 0))
    return max(map(int, counts))


def agree_on_steps(state: dict[str, Any]) -> None:
    """Writes into all parameter groups of what is to be saved how many steps any rank has counted. Collective.

    Rank 0 alone keeps them, and Transformer Engine's Adam counts none of a group without parameters: all groups of a
    pipeline rank with nothing to train.
    """
    steps = torch.tensor(saved_steps(state))
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    for group in state.get("optimizer", state)["param_groups"]:
        group["step"] = int(steps)


def for_adam(state: dict[str, Any], adam: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds of megatron's optimizer, with the parameter groups of `adam`, which is to load it."""
    loaded = state.get("optimizer", state)
    steps = saved_steps(state)
    taken = dict(loaded)
    taken["param_groups"] = [{**group, "step": steps} for group in adam.state_dict()["param_groups"]]
    if "state" in loaded:
        taken["state"] = {key: value for key, value in loaded["state"].items() if key != "common_step"}
        if isinstance(adam, torch.optim.AdamW):
            taken["state"]["common_step"] = torch.tensor(float(steps))
    return {**state, "optimizer": taken} if "optimizer" in state else taken
