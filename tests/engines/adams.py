"""Engines over each Adam that megatron may find: torch's, one in the shape of Transformer Engine's, and ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from soar_mega import platform


class TransformerEngineAdam(platform.FusedAdam):
    """Keeps what Transformer Engine's FusedAdam keeps; the library itself needs a GPU.

    Written after transformer_engine/pytorch/optimizers/fused_adam.py: each group needs `bias_correction`, and counts
    its steps from the first one on if it has parameters, with a tensor where capturable is set. state_dict hands out
    copies.
    """

    capturable = False

    def __init__(self, params, adam_w_mode=True, capturable=False, **settings):
        super().__init__(params, **settings)
        for group in self.param_groups:
            group["bias_correction"] = True

    def step(self, closure=None):
        for group in self.param_groups:
            assert group["bias_correction"] is True
            group["step"] = int(group.get("step", 0))
        super().step()
        for group in self.param_groups:
            if not group["params"]:
                del group["step"]
            elif self.capturable:
                group["step"] = torch.tensor([group["step"]], dtype=torch.int)

    def state_dict(self):
        state = super().state_dict()
        state["state"] = {key: dict(value) for key, value in state["state"].items()}
        return state


class CapturableAdam(TransformerEngineAdam):
    capturable = True


@contextmanager
def adam(name: str) -> Iterator[None]:
    """Inside the context, engines are built over this Adam."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    if name == "ours":
        yield
    elif name == "torch":
        with platform.without("fused_adam"):
            yield
    else:
        kind = {"transformer_engine": TransformerEngineAdam, "capturable": CapturableAdam}[name]
        with (
            patch.object(optimizer, "Adam", kind),
            patch.multiple(
                distributed_optimizer, Adam=kind, USING_APEX_OPTIMIZER=False, USING_TE_OPTIMIZER=True
            ),
        ):
            yield
