"""Any recipe on a laptop: its stage, its layout and all of its layers and heads, but narrow, on noise, four steps."""

from dataclasses import replace
from pathlib import Path

from soar_mega.config import DataConfig, Recipe, StageConfig
from soar_mega.config_checks import check_recipe
from soar_mega.distributed import check_layout
from soar_mega.stages import CollectingConfig
from soar_mega.training.scaled_down_inputs import PROMPTS, REWARD, write_inputs

ITERATIONS, SAMPLES_PER_REPLICA, POINTS = 4, 2, 4
RESOLUTION = 32  # pixels of what a stage draws


def scale_down(recipe: Recipe, processes: int, writes: bool) -> Recipe:
    """The recipe of a short run of a narrow model, in a folder beside the recipe's own.

    The folder is `<checkpoint.save>_scaled_down`: `inputs` has sizes and shards of noise, or tiny encoders and prompts
    for a stage that draws its samples; they are made anew at each start, to the same bytes. `run` is the run, which
    starts again where it was.

    Args:
        processes: of the whole world.
        writes: whether this process writes the inputs: rank 0.

    Raises:
        ValueError: the processes do not fit the recipe's layout, or the folder holds what this program did not write.
    """
    parallel = recipe.parallel
    layout = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    check_layout(processes, *layout, parallel.context_parallel_size)
    replicas = processes // parallel.replica_size
    folder = Path(f"{Path(recipe.checkpoint.save)}_scaled_down")
    if writes:
        write_inputs(recipe, folder / "inputs", SAMPLES_PER_REPLICA * replicas)
    small = _small(recipe, folder, replicas)
    check_recipe(small)
    return small


def _small(recipe: Recipe, folder: Path, replicas: int) -> Recipe:
    train, logging, inputs = recipe.train, recipe.logging, folder / "inputs"
    often, global_batch_size = ITERATIONS // 2, SAMPLES_PER_REPLICA * replicas
    data = _small_data(recipe.data, inputs, recipe.stage.collects)
    return replace(
        recipe,
        model=replace(recipe.model, preset="", pipeline_dir=str(inputs / "pipeline"), init="random"),
        stage=_small_stage(recipe.stage, global_batch_size),
        train=replace(
            train,
            train_iters=ITERATIONS,
            global_batch_size=global_batch_size,
            micro_batch_size=1,
            points_per_micro_batch=min(train.points_per_micro_batch or train.micro_batch_size, POINTS),
        ),
        optimizer=replace(
            recipe.optimizer,
            lr_warmup_iters=min(recipe.optimizer.lr_warmup_iters, 1),
            lr_decay_iters=None,
            lr_decay_start=None,
        ),
        lora=replace(recipe.lora, load=""),  # adapters of the large model
        data=data,
        checkpoint=replace(
            recipe.checkpoint,
            save=str(folder / "run"),
            load="",
            finetune=False,
            load_ema=False,
            save_interval=often,
            save_retain_interval=0,
        ),
        logging=replace(
            logging,
            log_interval=1,
            eval_interval=min(logging.eval_interval, often)
            if data.validation_path or data.validation_prompts
            else 0,
            eval_samples=SAMPLES_PER_REPLICA,
            drift_interval=min(logging.drift_interval, often) if data.validation_path else 0,
            drift_samples=SAMPLES_PER_REPLICA,
            sample_interval=0,  # shards have no encoders
        ),
    )


def _small_stage(stage: StageConfig, global_batch_size: int) -> StageConfig:
    """All that it is, but of two updates for a collection, judged by what needs no weights."""
    if not isinstance(stage, CollectingConfig):
        return stage
    return replace(
        stage,
        prompts_per_collection=global_batch_size,
        images_per_prompt=2,
        collect_micro_batch_size=min(stage.collect_micro_batch_size, POINTS),
        rewards={REWARD: 1.0},
        scorer_weights_dir="",
    )


def _small_data(data: DataConfig, inputs: Path, collects: bool) -> DataConfig:
    if collects:
        prompts = str(inputs / PROMPTS)
        return replace(
            data,
            validation_path="",
            prompts=prompts,
            validation_prompts=prompts if data.validation_prompts else "",
            prompt_cache="",
            resolution=RESOLUTION,
            max_sequence_length=None,
        )
    return replace(
        data,
        path=str(inputs / "train"),
        validation_path=str(inputs / "heldout") if data.validation_path else "",
        encode="shards",
        num_workers=min(data.num_workers, 1),
    )
