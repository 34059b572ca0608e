"""The first update of a collection learns from what the same weights have just drawn: every ratio is exactly 1."""

from pathlib import Path

import pytest
from rl_cases import rl_recipe, rl_steps

GUARD = {"stage__ratio": "guard", "stage__divide_by_step": "true"}
REPLAYED = {"stage__old_log_probabilities": "replayed"}


@pytest.mark.parametrize(
    "settings",
    [
        REPLAYED | {"stage__guidance_scale": 3.0},  # in the forwards of training, whatever the sampler's
        {"stage__guidance_scale": 1.0, "stage__variant": "dance"} | GUARD,
    ],
    ids=["replayed", "sampled"],
)
def test_ratio_is_one_to_the_bit_until_something_was_updated(
    settings: dict[str, object], tmp_path: Path
) -> None:
    """Sampled probabilities too, where forwards have one size and one branch."""
    same = {"train__points_per_micro_batch": 4, "stage__collect_micro_batch_size": 4}
    with rl_steps(rl_recipe(tmp_path, "flow_grpo", **same, **settings)) as run:
        assert run.collect() is not None
        first = run.learn()
        assert (first["ratio"], first["clipped"], first["approx_kl"]) == (1.0, 0.0, 0.0)
        assert run.update().ok
        second = run.learn()  # of the same collection, by other weights
        assert second["approx_kl"] > 0 and second["ratio"] != 1.0
