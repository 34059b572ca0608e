"""Settings that nothing would read: they are refused, or a user would take them for being in force."""

from collections.abc import Callable

from soar_mega.config import Recipe

# what reads settings only where another one says so, and what they are about
READ_WHERE: list[tuple[Callable[[Recipe], object], str, tuple[str, ...]]] = [
    (
        lambda recipe: recipe.train.ema_decay,
        "is about the EMA, which is kept with train.ema_decay above 0 (0.999, for example)",
        ("train.ema_update_interval", "train.ema_warm_up"),
    ),
    (
        lambda recipe: recipe.train.ema_decay or recipe.stage.kept_copies,
        "is about the EMA and the copies of weights that a stage compares with, and none is kept",
        ("train.offload_kept_weights",),
    ),
    (
        lambda recipe: recipe.parallel.engine == "deepspeed",
        "is DeepSpeed's: set parallel.engine=deepspeed",
        ("parallel.zero_stage", "parallel.offload_optimizer", "parallel.offload_parameters"),
    ),
    (
        lambda recipe: recipe.parallel.engine == "megatron",
        "is of the megatron engine: leave it out with parallel.engine=deepspeed",
        (
            "parallel.use_distributed_optimizer",
            "parallel.overlap_grad_reduce",
            "parallel.overlap_param_gather",
        ),
    ),
    (
        lambda recipe: recipe.model.recompute_granularity == "full",
        "is about whole layers: set model.recompute_granularity=full",
        ("model.recompute_every",),
    ),
    (
        lambda recipe: recipe.model.fp8,
        "is about FP8: set model.fp8=hybrid or e4m3",
        ("model.fp8_recipe",),
    ),
    (
        lambda recipe: recipe.model.first_last_layers_bf16,
        "says how many with model.first_last_layers_bf16=true",
        ("model.num_layers_at_start_in_bf16", "model.num_layers_at_end_in_bf16"),
    ),
    (
        lambda recipe: recipe.lora.rank,
        "is about adapters: set lora.rank",
        ("lora.alpha", "lora.dropout", "lora.targets", "lora.load"),
    ),
    (
        lambda recipe: recipe.stage.forwards().answers,
        "is for stages that ask the model before they learn, and this one does not: set it to false",
        ("parallel.overlap_rollout",),
    ),
    (
        lambda recipe: recipe.stage.collects,
        "is for stages that draw their samples: leave it out",
        ("data.validation_prompts", "data.prompt_cache", "data.resolution", "data.max_sequence_length"),
    ),
    (
        lambda recipe: recipe.optimizer.lr_decay_style != "constant",
        "is about a learning rate that decays: set optimizer.lr_decay_style=cosine or linear",
        ("optimizer.min_lr", "optimizer.lr_decay_iters", "optimizer.lr_decay_start"),
    ),
]


def check_what_is_read(recipe: Recipe) -> None:
    """Raise a ValueError that names a setting which differs from its default and which nothing reads."""
    for is_read, words, names in READ_WHERE:
        for name in names if not is_read(recipe) else ():
            group_name, _, key = name.partition(".")
            group = getattr(recipe, group_name)
            value, default = getattr(group, key), getattr(type(group)(), key)
            if value != default:
                raise ValueError(f"{name}={value} {words}")
