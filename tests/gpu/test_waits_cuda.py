"""A whole step under CUDA's own word for what the host waits for; its one wait, the gradient norm, is let through."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import SOAR, make_batch, make_recipe, start_engine

from soar_mega.stages import make_stage


def while_waiting_is_fine(call: Callable[[], Any]) -> Callable[[], Any]:
    def waits() -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return call()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return waits


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_waits_for_its_gradient_norm_alone(dtype: str) -> None:
    recipe = make_recipe(model={"dtype": dtype})
    engine, stage = start_engine(recipe), make_stage(SOAR, shift=1.0)
    engine.optimizer.get_grad_norm = while_waiting_is_fine(engine.optimizer.get_grad_norm)
    for step in range(2):
        batch = make_batch(step)
        torch.cuda.synchronize()
        # in the first step kernels are compiled, and libraries make what they keep
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            answers = engine.answer(stage.queries, batch)
            statistics = engine.learn(stage.points, stage.loss, batch, answers)
            result = engine.step(1e-3)
            loss = statistics["loss"]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert result.ok and loss > 0


def test_cuda_says_what_waits() -> None:
    value = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            value.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
