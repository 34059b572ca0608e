"""A whole step under CUDA's own word for what the host waits for; its one wait, the gradient norm, is let through."""

import subprocess
import sys
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


def test_without_transformer_engine_a_gradient_norm_stays_on_the_device() -> None:
    """In a process of its own: megatron takes what is there when it is imported."""
    code = """
import sys
sys.modules["transformer_engine"] = None
from soar_mega import platform
platform.install()
import torch
from megatron.core.optimizer import clip_grads
gradients = [torch.full((2, size), 3.0, device="cuda") for size in (1, 2, 5)]
overflow = torch.zeros(1, dtype=torch.int, device="cuda")
torch.cuda.set_sync_debug_mode("error")
norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [gradients], False)
torch.cuda.set_sync_debug_mode("default")
assert norm.shape == (1,) and abs(norm.item() - 12.0) < 1e-5
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
