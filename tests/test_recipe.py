"""Recipes: reading, overriding, refusing."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from soar_mega.config import Recipe
from soar_mega.config_checks import RULES
from soar_mega.recipe import read_yaml, recipe_to_yaml
from soar_mega.stages import SETTINGS, SftConfig, SftMultiConfig, SoarConfig, load_recipe

SMALLEST = """
model: {pipeline_dir: some/pipeline}
data: {path: some/shards}
checkpoint: {save: runs/x}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALLEST)
    return path


def load_text(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def test_defaults_and_file_values(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.model.pipeline_dir == "some/pipeline"
    assert recipe.stage == Recipe(stage=SoarConfig()).stage


def test_overrides_take_the_type_of_their_setting(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "train.train_iters=7",
            "train.train_iters=1e3",  # the last one wins; a whole float is a whole number
            "optimizer.lr=2e-5",
            "optimizer.weight_decay=0",
            "parallel.sequence_parallel=true",
            "stage.shift=null",
            "train.exit_duration_in_mins=2.5",
            "optimizer.frozen=[pos_embed*, 'context_embedder*']",
            "optimizer.lr_multipliers={'*norm*': 0.5}",
            "logging.drift_spans=[[0.9, 0.5]]",
            "data.path=runs/#1: {odd}",
            "checkpoint.save=2024",
        ],
    )
    assert recipe.train.train_iters == 1000 and type(recipe.train.train_iters) is int
    assert recipe.optimizer.lr == 2e-5
    assert recipe.optimizer.weight_decay == 0.0 and type(recipe.optimizer.weight_decay) is float
    assert recipe.parallel.sequence_parallel is True
    assert recipe.stage.shift is None
    assert recipe.train.exit_duration_in_mins == 2.5
    assert recipe.optimizer.frozen == ["pos_embed*", "context_embedder*"]
    assert recipe.optimizer.lr_multipliers == {"*norm*": 0.5}
    assert recipe.logging.drift_spans == [[0.9, 0.5]]
    assert recipe.data.path == "runs/#1: {odd}"
    assert recipe.checkpoint.save == "2024"


def test_the_settings_of_a_stage_are_those_of_the_one_that_is_named(
    recipe_file: Path, tmp_path: Path
) -> None:
    sft = load_recipe(recipe_file, ["stage.condition_dropout=0.1", "stage.name=sft"])  # in any order
    assert sft.stage == SftConfig(condition_dropout=0.1)
    assert load_text(tmp_path, recipe_to_yaml(sft)) == sft
    control = "stage: {num_auxiliary_points: 2, name: sft_multi}"
    assert load_text(tmp_path, SMALLEST + control).stage == SftMultiConfig(num_auxiliary_points=2)
    assert load_text(tmp_path, SMALLEST + control, "stage.name=soar").stage == SoarConfig(
        num_auxiliary_points=2
    )
    with pytest.raises(ValueError) as error:
        load_text(tmp_path, SMALLEST + control, "stage.eta=1")
    for word in (
        "stage.eta is a setting of stage.name=soar and flow_grpo, not of sft_multi, whose settings are name, shift",
        "num_auxiliary_points",
    ):
        assert word in str(error.value)
    with pytest.raises(
        ValueError,
        match="num_auxiliary_points is a setting of stage.name=soar and sft_multi, not of sft, whose",
    ):
        load_text(tmp_path, SMALLEST + "stage: {name: sft_multi, num_auxiliary_points: 2}", "stage.name=sft")


def test_written_recipe_reads_back_equal(recipe_file: Path, tmp_path: Path) -> None:
    names = ["checkpoint.save=1e3", "data.path=0100"]  # that look like numbers
    recipe = load_recipe(
        recipe_file, ["optimizer.lr=3e-7", "optimizer.lr_multipliers={a: 2}", "model.dtype=fp32", *names]
    )
    text = recipe_to_yaml(recipe)
    assert load_text(tmp_path, text) == recipe
    assert set(yaml.safe_load(text)) == {group.name for group in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("scale", ["3", "{1: 0.5, 3: 0.5}", "[1, 4.5]"])
def test_a_guidance_scale_is_a_number_or_spread_over_samples(
    recipe_file: Path, tmp_path: Path, scale: str
) -> None:
    recipe = load_recipe(recipe_file, [f"stage.guidance_scale={scale}"])
    expected = {"{1: 0.5, 3: 0.5}": {"1": 0.5, "3": 0.5}, "[1, 4.5]": [1.0, 4.5], "3": 3.0}
    assert recipe.stage.guidance_scale == expected[scale]
    assert load_text(tmp_path, recipe_to_yaml(recipe)) == recipe


def test_patterns_need_no_quotes_and_anchors_stay(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["lora.rank=4", "lora.targets=[*.attn.to_q,*.ff.net.*,*]", "optimizer.frozen=[*.embedder.*]"],
    )
    assert recipe.lora.targets == ["*.attn.to_q", "*.ff.net.*", "*"] and recipe.optimizer.frozen == [
        "*.embedder.*"
    ]
    (tmp_path / "anchors.yaml").write_text("a: &n 7\nb: *n\n")
    assert read_yaml(tmp_path / "anchors.yaml") == {"a": 7, "b": 7}


def test_every_rule_names_a_setting_and_the_defaults_obey() -> None:
    for settings in SETTINGS.values():
        stage = settings()  # type: ignore[call-arg]  # each has its name
        recipe = Recipe(stage=stage)
        for name, (holds, words) in (
            RULES | {f"stage.{key}": rule for key, rule in stage.rules.items()}
        ).items():
            group, key = name.split(".")
            value = getattr(getattr(recipe, group), key)  # AttributeError: the setting was renamed
            assert value is None or holds(value), f"{name}={value!r} is not {words}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "stage.num_auxillary_points=2",
            ["'stage.num_auxillary_points'", "did you mean stage.num_auxiliary_points?"],
        ),
        ("model.lr=1", ["'model.lr'", "did you mean optimizer.lr?"]),
        ("seed=1", ["'seed'", "did you mean train.seed?"]),
        ("trian.seed=1", ["did you mean train.seed?"]),
        ("parallel.zzz=1", ["the keys of parallel are", "tensor_model_parallel_size"]),
        ("zzz.yyy=1", ["the groups are model, stage"]),
        ("train.seed", ["write group.key=value"]),
        ("train.train_iters=1.5", ["train.train_iters", "a whole number", "1.5"]),
        ("train.train_iters=true", ["a whole number"]),
        ("train.seed=1e30", ["train.seed", "below 2^63"]),
        ("train.seed=" + "9" * 400, ["train.seed", "below 2^63"]),
        ("optimizer.lr=" + "9" * 400, ["optimizer.lr", "a number"]),
        ("train.seed=" + "9" * 5000, ["train.seed", "4300 digits"]),
        ("train.seed=2024-13-45", ["train.seed", "month must be in 1..12"]),
        ("optimizer.frozen=&a [*a]", ["optimizer.frozen[0]", "text"]),
        ("optimizer.frozen=" + "[" * 5000, ["optimizer.frozen", "not valid YAML"]),
        ("optimizer.lr_multipliers={[a]: 1}", ["optimizer.lr_multipliers", "a key is a name"]),
        ('logging.sample_prompts=["\\ud83e"]', ["logging.sample_prompts", "no text"]),
        ("train.train_iters=", ["a whole number", "None"]),
        ("optimizer.lr=fast", ["optimizer.lr", "a number", "'fast'"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "a number"]),
        ("train.train_iters=0100", ["a whole number", "'0100'"]),  # YAML 1.1 has it for 64
        ("train.exit_duration_in_mins=1:30", ["a number", "'1:30'"]),
        ("parallel.sequence_parallel=1", ["true or false"]),
        ("optimizer.frozen=a", ["optimizer.frozen", "a list"]),
        ("optimizer.lr_multipliers=[1]", ["a mapping"]),
        ("logging.drift_spans=[[0.9, x]]", ["logging.drift_spans[0][1]", "a number"]),
        ("train.seed=[1", ["train.seed", "not valid YAML"]),
        ("stage.eta=-1", ["stage.eta is -1.0", "at least 0"]),
        ("stage.guidance_scale={1: 0.5, 3: 0.4}", ["stage.guidance_scale is", "shares that add up to 1"]),
        ("stage.guidance_scale={one: 0.5, 3: 0.5}", ["stage.guidance_scale is", "a number of at least 0"]),
        (
            "stage.guidance_scale={1: 1.5, 2: 0, 3: -0.5}",
            ["stage.guidance_scale is", "shares that add up to 1"],
        ),
        ("stage.guidance_scale={-1: 1}", ["stage.guidance_scale is", "a number of at least 0"]),
        ("stage.guidance_scale=-1", ["stage.guidance_scale is -1", "a number of at least 0"]),
        ("stage.guidance_scale=[-1, 1]", ["stage.guidance_scale is [-1.0, 1.0]", "[low, high]"]),
        ("stage.guidance_scale=[1, 2, 3]", ["stage.guidance_scale is [1.0, 2.0, 3.0]", "[low, high]"]),
        ("stage.guidance_scale=[3, 1]", ["stage.guidance_scale is [3.0, 1.0]", "[low, high]"]),
        ("stage.guidance_scale=high", ["stage.guidance_scale", "a number", "'high'"]),
        ("stage.name=raft", ["stage.name is 'raft'", "one of soar, sft, sft_multi"]),
        ("train.ema_decay=1", ["train.ema_decay", "below 1"]),
        ("train.micro_batch_size=0", ["train.micro_batch_size is 0", "at least 1"]),
        (
            "train.micro_batch_size=3",
            ["train.global_batch_size (32)", "multiple of train.micro_batch_size (3)"],
        ),
        ("parallel.overlap_param_gather=true", ["parallel.overlap_grad_reduce=true"]),
        ("parallel.overlap_rollout=true", ["parallel.pipeline_model_parallel_size=2", "set it to false"]),
        ("model.pipeline_dir=", ["model.pipeline_dir", "model.preset"]),
        ("data.path=", ["data.path is empty"]),
        ("checkpoint.save=", ["checkpoint.save is empty"]),
        ("checkpoint.finetune=true", ["checkpoint.load"]),
        ("checkpoint.load_ema=true", ["checkpoint.finetune=true"]),
        ("checkpoint.save_retain_interval=750", ["multiple of checkpoint.save_interval (500)"]),
        ("optimizer.min_lr=1", ["optimizer.min_lr", "optimizer.lr"]),
        ("optimizer.lr_multipliers={'a*': -1}", ["optimizer.lr_multipliers.a*", "at least 0"]),
        ("logging.eval_interval=5", ["logging.eval_interval", "data.validation_path"]),
        ("logging.drift_interval=5", ["logging.drift_interval", "data.validation_path"]),
        ("logging.drift_spans=[[0.2, 0.5]]", ["[0.2, 0.5]", "from > to"]),
        ("logging.sample_interval=5", ["logging.sample_prompts"]),
    ],
)
def test_wrong_overrides_name_the_key_and_what_is_right(
    recipe_file: Path, override: str, words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe(recipe_file, [override])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.pipeline_dir=", "model.preset=sd35_medium"], ["model.init=random"]),
        (["model.pipeline_dir=", "model.preset=sd35_medium", "model.init=random"], ["stage.shift"]),
        (
            [
                "model.pipeline_dir=",
                "model.preset=x",
                "model.init=random",
                "stage.shift=3",
                "data.encode=online",
            ],
            ["data.encode=shards"],
        ),
        (["stage.rollout_steps=2", "stage.num_rollout_paths=2"], ["stage.rollout_steps=2", "ODE path alone"]),
        (
            ["optimizer.lr_decay_style=linear", "optimizer.lr_warmup_iters=10", "optimizer.lr_decay_start=5"],
            ["lr_decay_start (5)", "warm-up"],
        ),
        (["stage.rollout_variant=cps", "stage.eta=5"], ["stage.eta is 5", "at most 1"]),
        (["stage.timestep_density=mode", "stage.mode_scale=5"], ["stage.mode_scale is 5", "1.75"]),
        (["stage.rollout_steps=50"], ["stage.rollout_steps is 50", "stage.sampling_steps=40"]),
        (
            ["optimizer.lr_decay_style=cosine", "train.train_iters=10", "optimizer.lr_warmup_iters=11"],
            ["from iteration 11"],
        ),
    ],
)
def test_settings_that_do_not_fit_each_other(
    recipe_file: Path, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe(recipe_file, overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.ema_update_interval=2", "train.ema_decay above 0"),
        ("train.ema_warm_up=true", "train.ema_decay above 0"),
        ("train.offload_kept_weights=true", "none is kept"),
        ("parallel.zero_stage=3", "parallel.engine=deepspeed"),
        ("parallel.offload_optimizer=true", "parallel.engine=deepspeed"),
        ("parallel.offload_parameters=true", "parallel.engine=deepspeed"),
        ("model.recompute_every=2", "model.recompute_granularity=full"),
        ("model.fp8_recipe=delayed", "model.fp8=hybrid"),
        ("model.num_layers_at_start_in_bf16=2", "model.first_last_layers_bf16=true"),
        ("model.num_layers_at_end_in_bf16=2", "model.first_last_layers_bf16=true"),
        ("lora.alpha=1", "set lora.rank"),
        ("lora.dropout=0.1", "set lora.rank"),
        ("lora.load=adapters", "set lora.rank"),
        ("lora.targets=[*.ff.net.*]", "set lora.rank"),
        ("data.validation_prompts=prompts.txt", "stages that draw their samples"),
        ("data.prompt_cache=prompts", "stages that draw their samples"),
        ("data.resolution=512", "stages that draw their samples"),
        ("data.max_sequence_length=128", "stages that draw their samples"),
        ("optimizer.min_lr=1e-6", "optimizer.lr_decay_style=cosine"),
        ("optimizer.lr_decay_iters=10", "optimizer.lr_decay_style=cosine"),
        ("optimizer.lr_decay_start=1", "optimizer.lr_decay_style=cosine"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(recipe_file: Path, override: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"{override.split('=')[0]}=.*{words}"):
        load_recipe(recipe_file, [override])


def load_overlapped(name: str, override: str) -> Recipe:
    recipe = Path(__file__).parents[1] / f"recipes/tiny/{name}.yaml"
    overlap = ["parallel.pipeline_model_parallel_size=2", "parallel.overlap_rollout=true"]
    return load_recipe(recipe, [override, *overlap])


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("sft", "stage.logit_mean=0"),
        ("sft_multi", "stage.num_auxiliary_points=6"),
        ("soar", "stage.num_auxiliary_points=0"),
        ("flow_grpo", "stage.kl_beta=0"),
    ],
)
def test_overlap_rollout_is_refused_where_no_answers_travel(name: str, override: str) -> None:
    words = "parallel.overlap_rollout=True is for stages that ask the model before they learn"
    with pytest.raises(ValueError, match=words):
        load_overlapped(name, override)


@pytest.mark.parametrize(
    ("name", "override"), [("soar", "stage.num_auxiliary_points=1"), ("flow_grpo", "stage.kl_beta=0.04")]
)
def test_overlap_rollout_is_taken_where_answers_travel(name: str, override: str) -> None:
    assert load_overlapped(name, override).parallel.overlap_rollout


@pytest.mark.parametrize(
    "override", ["use_distributed_optimizer=false", "overlap_grad_reduce=true", "overlap_param_gather=true"]
)
def test_what_is_megatrons_is_refused_with_deepspeed(recipe_file: Path, override: str) -> None:
    words = f"parallel.{override.split('=')[0]}=.* is of the megatron engine"
    with pytest.raises(ValueError, match=words):
        load_recipe(recipe_file, ["parallel.engine=deepspeed", f"parallel.{override}"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  seed: 1\n  seed: 2\n", ["line 3", "'seed' is given twice"]),
        ("train: [1, 2]\n", ["train", "key: value"]),
        ("- train\n", ["key: value"]),
        ("train:\n\tseed: 1\n", ["line 2", "not valid YAML"]),
        ("model:\n  pipeline_dir: 3\n", ["model.pipeline_dir", "text (quote it)"]),
        ("trainn:\n  seed: 3\n", ["'trainn.seed'", "did you mean train.seed?"]),
    ],
)
def test_wrong_files_name_the_file_and_the_place(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_text(tmp_path, text)
    for word in ["other.yaml", *words]:
        assert word in str(error.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_bytes(b"model: {pipeline_dir: caf\xe9}")
    with pytest.raises(ValueError, match=r"other\.yaml: not UTF-8"):
        load_recipe(tmp_path / "other.yaml")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"soar\.yml: no such recipe file"):
        load_recipe(tmp_path / "soar.yml")


def test_empty_groups_keep_their_defaults(tmp_path: Path) -> None:
    assert load_text(tmp_path, SMALLEST + "train:\n").train == Recipe(stage=SoarConfig()).train


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.prompts="], "data.prompts is empty: flow_grpo draws its samples for prompts"),
        (["data.path=shards"], "data.path is not read by flow_grpo"),
        (
            ["data.resolution=[512]"],
            r"data.resolution is \[512\]: it must be a number of pixels, or \[width, height\]",
        ),
        (["data.resolution=big"], "data.resolution: expected a whole number"),
        (["model.pipeline_dir=", "model.preset=sd35_medium", "model.init=random"], "give model.pipeline_dir"),
        (["data.validation_prompts="], "prompts in data.validation_prompts"),
    ],
)
def test_what_a_stage_that_draws_its_samples_needs(overrides: list[str], said: str) -> None:
    recipe = Path(__file__).parents[1] / "recipes/tiny/flow_grpo.yaml"
    with pytest.raises(ValueError, match=said):
        load_recipe(recipe, overrides)
    assert load_recipe(recipe, ["data.resolution=[32, 16]"]).data.resolution == [32, 16]
    assert load_recipe(recipe, ["data.resolution=512"]).data.resolution == 512
    with pytest.raises(ValueError, match="data.prompts is for stages that draw their samples"):
        load_recipe(recipe.with_name("soar.yaml"), ["data.prompts=some.txt"])
