"""The recipes of SD3.5 Medium carry the published hyperparameters."""

from pathlib import Path

import pytest

from soar_mega.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes/sd35_medium"


@pytest.mark.parametrize("name", ["sft", "soar"])
def test_published_settings(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    stage, train, optimizer = recipe.stage, recipe.train, recipe.optimizer
    assert stage.name == name and recipe.model.dtype == "bf16"
    assert (train.global_batch_size, train.train_iters) == (32, 5000)
    assert (optimizer.lr, optimizer.lr_decay_style, optimizer.weight_decay) == (2e-5, "constant", 1e-2)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.999, 1e-8)
    assert optimizer.decay_all and optimizer.clip_grad == 1.0
    assert stage.condition_dropout == 0 and stage.timestep_density == "logit_normal"
    if name == "soar":
        assert (stage.num_auxiliary_points, stage.num_rollout_paths, stage.auxiliary_weight) == (6, 1, 1.0)
        assert (stage.guidance_scale, stage.sampling_steps, stage.sigma_upper_ratio) == (4.5, 40, 1.0)
