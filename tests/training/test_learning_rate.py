"""The learning rate against torch's own schedulers."""

import pytest
import torch

from soar_mega.config import OptimizerConfig
from soar_mega.training.learning_rate import learning_rate


def rates(config: OptimizerConfig, train_iters: int) -> list[float]:
    return [learning_rate(config, iteration, train_iters) for iteration in range(train_iters)]


def torch_rates(steps: int, make) -> list[float]:  # noqa: ANN001
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    values = []
    for _ in range(steps):
        values.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return values


def test_constant_after_a_linear_warm_up() -> None:
    config = OptimizerConfig(lr=1.0, lr_warmup_iters=4)
    expected = torch_rates(
        10, lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=3)
    )
    assert rates(config, 10) == pytest.approx(expected)


def test_cosine() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, lr_decay_style="cosine")
    expected = torch_rates(20, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20, eta_min=0.1))
    assert rates(config, 20) == pytest.approx(expected)


def test_linear_decay_over_the_last_part() -> None:
    config = OptimizerConfig(lr=1.0, lr_decay_style="linear", lr_decay_start=6, lr_decay_iters=10)
    assert rates(config, 12) == pytest.approx([1.0] * 6 + [1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_decay_begins_after_warm_up() -> None:
    config = OptimizerConfig(lr=1.0, lr_decay_style="linear", lr_warmup_iters=2)
    assert rates(config, 6) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("end", [3, 4])
def test_the_shortest_decay_is_over_after_one_step(end: int) -> None:
    config = OptimizerConfig(lr=1.0, lr_decay_style="linear", lr_decay_start=3, lr_decay_iters=end)
    assert rates(config, 6) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_unknown_style() -> None:
    with pytest.raises(
        ValueError, match=r"optimizer.lr_decay_style: 'cosin' is unknown; choose constant, cosine"
    ):
        learning_rate(OptimizerConfig(lr_decay_style="cosin"), 0, 1)
