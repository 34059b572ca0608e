"""A step on own samples on a GPU: guided points, kept copies in pinned memory, and what is measured is learned."""

from dataclasses import replace

import pytest
import torch
from collecting_cases import (
    Collecting,
    answered,
    collected_batch,
    collecting_recipe,
    learn_once,
    with_kept_weights,
)
from engine_cases import SIZES, assert_gradients_agree
from test_waits_cuda import while_waiting_is_fine


def two_steps(**settings):
    """What is measured, the statistics and the gradients of the second step, and the old weights after it."""
    train = {"global_batch_size": 8, "micro_batch_size": 3, "points_per_micro_batch": 3}
    recipe = collecting_recipe(model={"dtype": "fp32"}, train=train | settings)
    engine, stage, batch = with_kept_weights(recipe), Collecting(), collected_batch()
    for _ in range(2):
        measured = engine.measure(stage.points, stage.log_probability, batch)
        statistics = dict(learn_once(engine, stage, batch))
        gradients = engine.gradients()
        assert engine.step(1e-3).ok
        engine.blend_weights("old", 0.5)
    return measured, statistics, gradients, engine.weights["old"].still()


def test_graphs_and_the_place_of_copies_change_nothing() -> None:
    measured, statistics, gradients, old = two_steps(cuda_graphs="none")
    assert all(piece.is_cuda for piece in old.values())
    again, recorded, found, on_host = two_steps(cuda_graphs="layers", offload_kept_weights=True)
    assert not any(piece.is_cuda for piece in on_host.values())
    torch.testing.assert_close(again, measured, rtol=1e-5, atol=1e-6)
    assert recorded == pytest.approx(statistics, rel=1e-5)
    assert_gradients_agree(found, gradients)
    for name, piece in old.items():
        torch.testing.assert_close(on_host[name], piece.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, head_size", [("fp32", 4), ("bf16", 4), ("bf16", 64)])
def test_what_is_measured_is_what_learning_sees(dtype: str, head_size: int) -> None:
    """Also with heads of a size for which answers take another attention."""
    sizes = replace(SIZES, attention_head_dim=head_size, caption_projection_dim=4 * head_size)
    engine = with_kept_weights(collecting_recipe(model={"dtype": dtype}), sizes)
    stage, batch = Collecting(), collected_batch()
    measured = engine.measure(stage.points, stage.loss, batch, **answered(engine, stage, batch))
    learn_once(engine, stage, batch)
    assert torch.equal(measured, engine.learned[1])


def test_a_step_waits_for_its_gradient_norm_alone() -> None:
    train = {
        "global_batch_size": 8,
        "micro_batch_size": 3,
        "points_per_micro_batch": 3,
        "offload_kept_weights": True,
    }
    engine = with_kept_weights(collecting_recipe(model={"dtype": "bf16"}, train=train))
    assert all(piece.is_pinned() for one in engine.weights.values() for piece in one.pieces.values())
    engine.optimizer.get_grad_norm = while_waiting_is_fine(engine.optimizer.get_grad_norm)
    stage = Collecting()
    for step in range(2):
        batch = collected_batch()
        torch.cuda.synchronize()
        # in the first step kernels are compiled, layers recorded, and libraries make what they keep
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            engine.measure(stage.points, stage.log_probability, batch)
            statistics = learn_once(engine, stage, batch)
            result = engine.step(1e-3)
            engine.blend_weights("old", 0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert result.ok and statistics["ratio"] > 0
