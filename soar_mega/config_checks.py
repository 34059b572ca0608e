"""What a recipe may say: the range of each setting, and the settings that must fit each other."""

from soar_mega import layer_checks
from soar_mega.config import ParallelConfig, Recipe
from soar_mega.rules import Rule, above, at_least, from_below, one_of, within
from soar_mega.unread_settings import check_what_is_read
from soar_mega.user_files import is_text

RULES: dict[str, Rule] = {
    "model.init": one_of("pretrained", "random"),
    "model.dtype": one_of("fp32", "bf16"),
    "model.transformer_impl": one_of(*layer_checks.IMPLEMENTATIONS),
    "model.attention_backend": one_of(*layer_checks.ATTENTION_BACKENDS),
    "model.fp8": one_of(*layer_checks.FP8_FORMATS),
    "model.fp8_recipe": one_of(*layer_checks.FP8_RECIPES),
    "model.num_layers_at_start_in_bf16": at_least(0),
    "model.num_layers_at_end_in_bf16": at_least(0),
    "model.recompute_granularity": one_of("none", "selective", "full"),
    "model.recompute_every": at_least(1),
    "parallel.engine": one_of("megatron", "deepspeed"),
    "parallel.zero_stage": within(0, 3),
    "parallel.tensor_model_parallel_size": at_least(1),
    "parallel.pipeline_model_parallel_size": at_least(1),
    "parallel.context_parallel_size": at_least(1),
    "parallel.virtual_pipeline_model_parallel_size": at_least(1),
    "parallel.decoder_first_pipeline_num_layers": at_least(1),
    "parallel.decoder_last_pipeline_num_layers": at_least(1),
    "train.seed": at_least(0),
    "train.train_iters": at_least(1),
    "train.global_batch_size": at_least(1),
    "train.micro_batch_size": at_least(1),
    "train.points_per_micro_batch": at_least(1),
    "train.cuda_graphs": one_of("none", "layers"),
    "train.ema_decay": from_below(0, 1),
    "train.ema_update_interval": at_least(1),
    "train.exit_duration_in_mins": above(0),
    "train.step_timeout_minutes": above(0),
    "train.phase_timeout_minutes": above(0),
    "train.max_skipped_steps": at_least(1),
    "optimizer.lr": at_least(0),
    "optimizer.min_lr": at_least(0),
    "optimizer.lr_decay_style": one_of("constant", "cosine", "linear"),
    "optimizer.lr_warmup_iters": at_least(0),
    "optimizer.lr_decay_iters": at_least(1),
    "optimizer.lr_decay_start": at_least(0),
    "optimizer.weight_decay": at_least(0),
    "optimizer.adam_beta1": from_below(0, 1),
    "optimizer.adam_beta2": from_below(0, 1),
    "optimizer.adam_eps": above(0),
    "optimizer.clip_grad": at_least(0),
    "lora.rank": at_least(0),
    "lora.alpha": above(0),
    "lora.dropout": from_below(0, 1),
    "data.encode": one_of("shards", "online"),
    "data.num_workers": at_least(0),
    "data.cache_gb": at_least(0),
    "data.max_sequence_length": at_least(1),
    "data.max_failed_share": within(0, 1),
    "checkpoint.save_interval": at_least(1),
    "checkpoint.keep_last": at_least(0),
    "checkpoint.export_dtype": one_of("model", "bf16", "fp32"),
    "checkpoint.save_retain_interval": at_least(0),
    "logging.log_interval": at_least(1),
    "logging.peak_tflops": above(0),
    "logging.loss_spike_factor": at_least(0),
    "logging.straggler_factor": at_least(0),
    "logging.eval_interval": at_least(0),
    "logging.eval_samples": at_least(1),
    "logging.drift_interval": at_least(0),
    "logging.drift_samples": at_least(1),
    "logging.drift_steps": at_least(1),
    "logging.collection_interval": at_least(0),
    "logging.sample_interval": at_least(0),
    "logging.sample_steps": at_least(1),
    "logging.sample_guidance_scale": at_least(0),
}


def check_recipe(recipe: Recipe) -> None:
    """Raise a ValueError that names the setting and what would be right, unless the recipe can be run.

    What depends on the number of processes or on files is checked where these are known.
    """
    of_stage = {f"stage.{key}": rule for key, rule in recipe.stage.rules.items()}
    for name, (holds, words) in (RULES | of_stage).items():
        group, _, key = name.partition(".")
        value = getattr(getattr(recipe, group), key)
        if value is not None and not holds(value):
            raise ValueError(f"{name} is {value!r}: it must be {words}")
    check_what_is_read(recipe)
    for check in (
        _check_model,
        _check_data,
        _check_batch,
        _check_stage,
        _check_parallel,
        _check_deepspeed,
        _check_optimizer,
        _check_lora,
        _check_checkpoint,
        _check_logging,
    ):
        check(recipe)


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _check_model(recipe: Recipe) -> None:
    model = recipe.model
    _require(
        model.pipeline_dir or model.preset,
        "which model? Name a diffusers pipeline folder in model.pipeline_dir, or sizes alone in model.preset",
    )
    _require(
        model.pipeline_dir or model.init == "random",
        "model.preset has sizes but no weights: set model.init=random, or give model.pipeline_dir",
    )
    _require(
        model.pipeline_dir or recipe.stage.shift is not None,
        "stage.shift is taken from the pipeline's scheduler: with model.preset it must be given (SD3.5: 3.0)",
    )
    _require(
        model.pipeline_dir or recipe.data.encode == "shards",
        "data.encode=online needs the encoders of a pipeline: give model.pipeline_dir, or use data.encode=shards",
    )
    layer_checks.check_layers(model)


def _check_data(recipe: Recipe) -> None:
    data, stage = recipe.data, recipe.stage.name
    if not recipe.stage.collects:
        _require(data.path, "data.path is empty: name the shard folder that `soar-mega prepare` wrote")
        _require(
            not data.prompts,
            f"data.prompts is for stages that draw their samples, and {stage} learns from data.path: leave it out",
        )
        return
    _require(
        data.prompts,
        f"data.prompts is empty: {stage} draws its samples for prompts. Name a .txt or .jsonl file, or a folder with "
        "train.txt or train_metadata.jsonl",
    )
    _require(not data.path, f"data.path is not read by {stage}, which draws its samples: leave it out")
    _require(
        recipe.model.pipeline_dir,
        f"{stage} needs the encoders and the VAE of a pipeline: give model.pipeline_dir",
    )
    _require(
        not isinstance(data.resolution, list) or len(data.resolution) == 2,
        f"data.resolution is {data.resolution}: it must be a number of pixels, or [width, height]",
    )


def _check_batch(recipe: Recipe) -> None:
    train = recipe.train
    _require(
        train.global_batch_size % train.micro_batch_size == 0,
        f"train.global_batch_size ({train.global_batch_size}) must be a multiple of train.micro_batch_size "
        f"({train.micro_batch_size}) times the number of data-parallel replicas",
    )


def _check_stage(recipe: Recipe) -> None:
    recipe.stage.check(recipe)


def check_replicas(global_batch_size: int, replicas: int) -> None:
    """Raise a ValueError unless the samples of a step can be dealt out evenly."""
    nearest = max(1, round(global_batch_size / replicas)) * replicas
    _require(
        global_batch_size % replicas == 0,
        f"train.global_batch_size ({global_batch_size}) must be a multiple of the {replicas} data-parallel replicas: "
        f"nearest is {nearest}",
    )


def _check_parallel(recipe: Recipe) -> None:
    parallel = recipe.parallel
    _require(
        not parallel.overlap_param_gather
        or (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce),
        "parallel.overlap_param_gather needs parallel.use_distributed_optimizer=true and "
        "parallel.overlap_grad_reduce=true",
    )
    _require(
        not parallel.overlap_rollout
        or (
            parallel.pipeline_model_parallel_size > 1
            and (parallel.virtual_pipeline_model_parallel_size or 1) == 1
        ),
        "parallel.overlap_rollout needs parallel.pipeline_model_parallel_size=2 or more, not interleaved "
        "(parallel.virtual_pipeline_model_parallel_size=1): set it to false",
    )
    check_pipeline(parallel)


def check_pipeline(parallel: ParallelConfig) -> None:
    """Raise a ValueError for a pipeline that is not possible for any number of layers."""
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    several = parallel.pipeline_model_parallel_size > 1
    _require(
        several or chunks == 1,
        f"parallel.virtual_pipeline_model_parallel_size={chunks} interleaves the parts of several pipeline ranks: "
        "leave it out, or set parallel.pipeline_model_parallel_size=2 or more",
    )
    for key in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
        layers = getattr(parallel, key)
        if layers is None:
            continue
        _require(
            several,
            f"parallel.{key}={layers} is about several pipeline ranks: leave it out, or set "
            "parallel.pipeline_model_parallel_size=2 or more",
        )
        _require(
            layers % chunks == 0,
            f"parallel.{key}={layers} must be a multiple of parallel.virtual_pipeline_model_parallel_size={chunks}: "
            f"nearest is {max(1, round(layers / chunks)) * chunks}",
        )


def _check_deepspeed(recipe: Recipe) -> None:
    parallel = recipe.parallel
    if parallel.engine != "deepspeed":
        return
    _require(
        parallel.pipeline_model_parallel_size == 1,
        "parallel.engine=deepspeed has no pipeline parallelism: set parallel.pipeline_model_parallel_size=1 (and "
        "parallel.zero_stage=3 where the model does not fit), or parallel.engine=megatron",
    )
    _require(
        parallel.context_parallel_size == 1,
        "parallel.engine=deepspeed has no context parallelism: set parallel.context_parallel_size=1 (and "
        "model.recompute_granularity=full where activations do not fit), or parallel.engine=megatron",
    )
    _require(
        parallel.zero_stage > 0 or recipe.model.dtype == "fp32",
        "parallel.zero_stage=0 would add up the gradients of micro-batches in bf16: set parallel.zero_stage=1, or "
        "model.dtype=fp32",
    )
    _require(
        parallel.zero_stage > 0 or not parallel.offload_optimizer,
        "parallel.offload_optimizer needs parallel.zero_stage=1, 2 or 3",
    )
    _require(
        parallel.zero_stage == 3 or not parallel.offload_parameters,
        "parallel.offload_parameters needs parallel.zero_stage=3",
    )
    _require(
        parallel.zero_stage < 3 or recipe.model.fp8 is None,
        "model.fp8 keeps every weight whole in FP8, which parallel.zero_stage=3 is there to avoid: set "
        "parallel.zero_stage=2, or leave model.fp8 out",
    )


def _check_optimizer(recipe: Recipe) -> None:
    optimizer = recipe.optimizer
    _require(
        optimizer.min_lr <= optimizer.lr,
        f"optimizer.min_lr ({optimizer.min_lr}) must not be above optimizer.lr ({optimizer.lr})",
    )
    end = optimizer.lr_decay_iters or recipe.train.train_iters
    start = optimizer.lr_warmup_iters if optimizer.lr_decay_start is None else optimizer.lr_decay_start
    _require(
        optimizer.lr_warmup_iters <= start,
        f"optimizer.lr_decay_start ({start}) must not be before the end of the warm-up "
        f"(optimizer.lr_warmup_iters={optimizer.lr_warmup_iters})",
    )
    _require(
        optimizer.lr_decay_style == "constant" or start <= end,
        f"the learning rate cannot decay from iteration {start} to {end}: optimizer.lr_warmup_iters and "
        "optimizer.lr_decay_start must not be above optimizer.lr_decay_iters (or train.train_iters)",
    )
    for pattern, factor in optimizer.lr_multipliers.items():
        _require(factor >= 0, f"optimizer.lr_multipliers.{pattern} is {factor}: it must be at least 0")


def _check_lora(recipe: Recipe) -> None:
    lora = recipe.lora
    _require(
        lora.targets,
        "lora.targets is empty: name linears, or set lora.rank=0 to train the weights themselves",
    )


def _check_checkpoint(recipe: Recipe) -> None:
    checkpoint = recipe.checkpoint
    _require(
        checkpoint.save,
        "checkpoint.save is empty: name the run folder, for example checkpoint.save=runs/first",
    )
    _require(
        checkpoint.load or not checkpoint.finetune,
        "checkpoint.finetune starts from the weights of another run: name its folder in checkpoint.load",
    )
    _require(
        checkpoint.save_retain_interval % checkpoint.save_interval == 0,
        f"checkpoint.save_retain_interval ({checkpoint.save_retain_interval}) must be a multiple of "
        f"checkpoint.save_interval ({checkpoint.save_interval})",
    )
    _require(
        checkpoint.finetune or not checkpoint.load_ema,
        "checkpoint.load_ema takes the EMA weights as a start: it needs checkpoint.finetune=true",
    )


def _check_logging(recipe: Recipe) -> None:
    logging = recipe.logging
    data = recipe.data
    _require(
        data.validation_path or data.validation_prompts or not logging.eval_interval,
        "logging.eval_interval needs held-out samples: name their shard folder in data.validation_path"
        + (", or prompts in data.validation_prompts" if recipe.stage.collects else ""),
    )
    _require(
        data.validation_path or not logging.drift_interval,
        "logging.drift_interval needs held-out samples: name their shard folder in data.validation_path",
    )
    for span in logging.drift_spans:
        _require(
            len(span) == 2 and 1.0 >= span[0] > span[1] > 0.0,
            f"logging.drift_spans holds {span}: a span is [sigma from, sigma to] with 1 >= from > to > 0",
        )
    for prompt in logging.sample_prompts:
        _require(
            is_text(prompt), f"logging.sample_prompts holds {prompt!r}, which is no text: half a character"
        )
    _require(
        not logging.sample_interval or (logging.sample_prompts and recipe.model.pipeline_dir),
        "logging.sample_interval needs prompts (logging.sample_prompts) and encoders (model.pipeline_dir)",
    )
