"""Recipes of large models on a laptop: as many layers and heads, at the recipe's own layout."""

from pathlib import Path

import pytest

from soar_mega.cli import main
from soar_mega.data.encoder_facts import encoder_facts
from soar_mega.data.prompt_files import read_prompts
from soar_mega.models.family import model_sizes
from soar_mega.stages import load_recipe
from soar_mega.training.scale_down import scale_down

RECIPES = Path(__file__).parents[2] / "recipes"
LARGE = RECIPES / "sd35_large/soar.yaml"


def test_layers_heads_layout_and_stage_stay(tmp_path):
    whole = load_recipe(LARGE)
    words = [f"checkpoint.save={tmp_path}/run"]
    small = scale_down(load_recipe(LARGE, words), 16, writes=True)
    sizes = model_sizes(small.model)
    assert (sizes.num_layers, sizes.num_attention_heads, sizes.hidden_size) == (38, 38, 152)
    assert (small.stage, small.parallel, small.optimizer.lr) == (
        whole.stage,
        whole.parallel,
        whole.optimizer.lr,
    )
    assert (small.train.train_iters, small.train.global_batch_size) == (4, 4)  # two replicas
    assert small.checkpoint.save == f"{tmp_path}/run_scaled_down/run"
    first = {path: path.read_bytes() for path in Path(small.data.path).iterdir()}
    scale_down(load_recipe(LARGE, words), 16, writes=True)
    assert first == {path: path.read_bytes() for path in Path(small.data.path).iterdir()}


def test_nothing_of_the_user_is_replaced(tmp_path):
    (tmp_path / "run_scaled_down/inputs").mkdir(parents=True)
    (tmp_path / "run_scaled_down/inputs/mine.txt").write_text("mine")
    recipe = load_recipe(LARGE, [f"checkpoint.save={tmp_path}/run"])
    with pytest.raises(ValueError, match=r"mine\.txt"):
        scale_down(recipe, 8, writes=True)
    with pytest.raises(ValueError, match="12"):
        scale_down(recipe, 12, writes=True)


@pytest.mark.parametrize("name", ["flow_grpo_ocr", "nft_multi_reward"])
def test_a_method_that_draws_its_samples_keeps_its_settings(name, tmp_path, caplog):
    caplog.set_level("INFO")
    words = [
        f"checkpoint.save={tmp_path}/run",
        "data.validation_prompts=there",
        "data.validation_path=heldout",
    ]
    words += ["logging.eval_interval=2", "logging.drift_interval=2"]
    whole = load_recipe(RECIPES / f"sd35_medium/{name}.yaml", words)
    small = scale_down(whole, 1, writes=True)
    sizes, facts = model_sizes(small.model), encoder_facts(Path(small.model.pipeline_dir))
    assert (sizes.num_layers, sizes.num_attention_heads) == (24, 24)
    assert (facts.latent_channels, facts.text_shape[1]) == (sizes.in_channels, sizes.joint_attention_dim)
    assert (small.stage.sampling_steps, small.stage.kl_beta) == (
        whole.stage.sampling_steps,
        whole.stage.kl_beta,
    )
    assert small.stage.samples_per_collection == 2 * small.train.global_batch_size
    assert len(read_prompts(small.data.prompts)) >= small.stage.prompts_per_collection
    assert small.data.validation_prompts == small.data.prompts
    assert small.logging.eval_interval == 2 and small.logging.drift_interval == 0
    assert "nothing stands in for data.validation_path=heldout" in caplog.text
    assert f"stand in for data.prompts={whole.data.prompts}" in caplog.text
    assert f"the rewards {', '.join(whole.stage.rewards)}" in caplog.text
    first = {path: path.read_bytes() for path in Path(small.model.pipeline_dir).rglob("*.json")}
    scale_down(whole, 1, writes=True)
    assert first == {path: path.read_bytes() for path in Path(small.model.pipeline_dir).rglob("*.json")}


def test_the_encoders_are_those_of_the_family(tmp_path):
    words = [f"checkpoint.save={tmp_path}/run", "model.preset=flux_dev", "model.pipeline_dir=models/flux"]
    small = scale_down(load_recipe(RECIPES / "sd35_medium/flow_grpo_ocr.yaml", words), 1, writes=True)
    sizes, facts = model_sizes(small.model), encoder_facts(Path(small.model.pipeline_dir))
    assert (sizes.layers_in_words, sizes.num_attention_heads) == ("19 double and 38 single layers", 24)
    assert (facts.latent_channels, *facts.text_shape[1:], facts.pooled_size) == (
        sizes.in_channels,
        sizes.joint_attention_dim,
        sizes.pooled_projection_dim,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["flow_grpo_ocr", "nft_multi_reward"])
def test_a_method_that_draws_its_samples_runs(name, tmp_path):
    words = [f"checkpoint.save={tmp_path}/run"]
    assert main(["train", str(RECIPES / f"sd35_medium/{name}.yaml"), "--scale-down", *words]) == 0
    run = tmp_path / "run_scaled_down/run"
    told = (run / "train.log").read_text()
    assert "collection 1 for iteration 3 | reward/total: " in told
    assert (run / "complete.json").is_file() and (run / "export/transformer/config.json").is_file()


@pytest.mark.slow
def test_a_recipe_of_two_billion_parameters_runs(tmp_path, caplog):
    words = [f"checkpoint.save={tmp_path}/run", "model.dtype=fp32", "lora.load=adapters"]  # of the large one
    assert main(["train", str(RECIPES / "sd35_medium/soar_lora.yaml"), "--scale-down", *words]) == 0
    run = tmp_path / "run_scaled_down/run"
    assert (run / "complete.json").is_file() and (run / "export/transformer/config.json").is_file()
