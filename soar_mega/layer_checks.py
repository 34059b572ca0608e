"""Which layers, attention and precision go together (model.*), and what they need of a machine."""

from importlib import import_module
from importlib.util import find_spec

from soar_mega.config import ModelConfig

IMPLEMENTATIONS = ("local", "transformer_engine")
ATTENTION_BACKENDS = ("sdpa", "auto", "flash", "fused", "unfused")
FP8_FORMATS = ("e4m3", "hybrid")
FP8_RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
LINEAR_INPUTS = ("layernorm", "mlp_act")  # which linears in FP8 keep in a form of their own
RECOMPUTE_MODULES = ("core_attn", *LINEAR_INPUTS, "qk_layernorm")

# the first GPUs that can: compute capability
FLASH_CAPABILITY = (8, 0)
FLASH_3_CAPABILITY = (9, 0)
FP8_CAPABILITIES = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}

FLASH_MODULE = "flash_attn"
FLASH_3_MODULE = "flash_attn_3"
FLASH_3_OPERATORS = "flash_attn_3._C"  # registers torch.ops.flash_attn_3
FLASH_3_CONFIG = "flash_attn_config"  # what it was compiled with
FLASH_3_HEAD_SIZES = (64, 96, 128, 192, 256)


def check_layers(model: ModelConfig) -> None:
    """Raise a ValueError with advice unless the settings of the layers fit each other."""
    for key, names in (
        ("transformer_impl", IMPLEMENTATIONS),
        ("attention_backend", ATTENTION_BACKENDS),
        ("fp8", (None, *FP8_FORMATS)),
        ("fp8_recipe", FP8_RECIPES),
    ):
        value = getattr(model, key)
        if value not in names:
            known = ", ".join("null" if name is None else name for name in names)
            raise ValueError(f"model.{key}={value!r} is unknown: choose one of {known}")
    backend = model.attention_backend
    if model.transformer_impl == "local" and backend not in ("sdpa", "flash"):
        raise ValueError(
            f"model.attention_backend={backend} is Transformer Engine's: set "
            "model.transformer_impl=transformer_engine, or model.attention_backend=sdpa or flash"
        )
    if backend in ("flash", "fused") and model.dtype != "bf16":
        raise ValueError(
            f"model.attention_backend={backend} computes in 16 bits only: set model.dtype=bf16, or "
            "model.attention_backend=sdpa"
        )
    _check_recomputation(model)
    if model.fp8 is not None:
        _check_fp8(model)
    elif model.first_last_layers_bf16:
        raise ValueError(
            "model.first_last_layers_bf16 is an exception from FP8: set model.fp8, or leave it out"
        )


def _check_recomputation(model: ModelConfig) -> None:
    modules, known = set(model.recompute_modules), ", ".join(RECOMPUTE_MODULES)
    if unknown := modules.difference(RECOMPUTE_MODULES):
        raise ValueError(f"model.recompute_modules: {min(unknown)!r} is unknown: choose from {known}")
    if model.recompute_granularity == "selective" and not modules:
        raise ValueError(
            f"model.recompute_granularity=selective needs model.recompute_modules, of {known}: name some, or set "
            "model.recompute_granularity=none"
        )
    if model.recompute_granularity != "selective" and modules != {"core_attn"}:
        raise ValueError(
            f"model.recompute_modules is for model.recompute_granularity=selective, and that is "
            f"{model.recompute_granularity}: set it to selective, or model.recompute_modules=[core_attn]"
        )
    if model.fp8 is not None and (useless := model.made_again.intersection(LINEAR_INPUTS)):
        raise ValueError(
            f"model.recompute_modules: linears in FP8 keep their own casts of what they read, so nothing is saved by "
            f"{' and '.join(sorted(useless))}: leave {'them' if len(useless) > 1 else 'it'} out"
        )


def _check_fp8(model: ModelConfig) -> None:
    if model.transformer_impl != "transformer_engine":
        raise ValueError(
            f"model.fp8={model.fp8} is done by Transformer Engine: set model.transformer_impl=transformer_engine, or "
            "leave model.fp8 out"
        )
    if model.dtype != "bf16":
        raise ValueError(
            f"model.fp8={model.fp8} is for the layers of a bf16 model: set model.dtype=bf16 (the optimizer's weights "
            "stay float32)"
        )
    if model.fp8_recipe == "delayed" and model.first_last_layers_bf16:
        raise ValueError(
            "model.fp8_recipe=delayed keeps one history for all layers: set model.first_last_layers_bf16=false, or "
            "model.fp8_recipe=tensorwise"
        )


def check_machine(model: ModelConfig) -> None:
    """Raise a ValueError with the reason where this machine cannot run the model's layers."""
    if (reason := why_not(model)) is not None:
        raise ValueError(reason)


def why_not(model: ModelConfig) -> str | None:
    """Why this machine cannot run the model's layers; None where it can."""
    if model.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import HAVE_TE

        # megatron puts mocks in place of missing classes, which fail later and elsewhere
        if not HAVE_TE:
            return (
                "model.transformer_impl=transformer_engine needs Transformer Engine, which is not installed here: "
                "install the extra `gpu`, or set model.transformer_impl=local"
            )
    if model.transformer_impl == "local" and model.attention_backend == "sdpa":
        return None
    wanted = (
        "model.transformer_impl=transformer_engine"
        if model.transformer_impl == "transformer_engine"
        else f"model.attention_backend={model.attention_backend}"
    )
    capability = gpu_capability()
    if capability is None:
        return (
            f"{wanted} needs a GPU, which this process does not see: set model.transformer_impl=local and "
            "model.attention_backend=sdpa"
        )
    if model.attention_backend == "flash" and flash_version(capability) is None:
        if capability < FLASH_CAPABILITY:
            return (
                "model.attention_backend=flash needs a GPU of compute capability 8.0 or more (this one has "
                f"{_dotted(capability)}): set model.attention_backend=sdpa"
            )
        return (
            "model.attention_backend=flash needs the package flash-attn, which is not installed here: install it, or "
            "set model.attention_backend=sdpa"
        )
    if model.fp8 is not None and capability < FP8_CAPABILITIES[model.fp8_recipe]:
        return (
            f"model.fp8={model.fp8} with model.fp8_recipe={model.fp8_recipe} needs a GPU of compute capability "
            f"{_dotted(FP8_CAPABILITIES[model.fp8_recipe])} or more, and this one has {_dotted(capability)}: leave "
            f"model.fp8 out{_other_recipes(capability)}"
        )
    return None


def gpu_capability() -> tuple[int, int] | None:
    """The compute capability of this process's GPU; None without one."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def flash_version(capability: tuple[int, int]) -> int | None:
    """Which flash-attn a GPU uses: 3 on Hopper where it is installed, else 2; None: neither can run."""
    if capability[0] == FLASH_3_CAPABILITY[0] and find_spec(FLASH_3_MODULE):
        return 3
    return 2 if capability >= FLASH_CAPABILITY and find_spec(FLASH_MODULE) else None


def has_flash_3(head_size: int) -> bool:
    """Whether flash-attn 3 is installed, for Hopper, and was compiled for heads of this size."""
    return flash_version(FLASH_3_CAPABILITY) == 3 and head_size <= max(flash_3_head_sizes())


def flash_3_head_sizes() -> list[int]:
    """Sizes of a head that flash-attn 3 was compiled for; a smaller head is computed as the next of them."""
    if not find_spec(FLASH_3_CONFIG):
        return list(FLASH_3_HEAD_SIZES)
    flags = import_module(FLASH_3_CONFIG).CONFIG["build_flags"]
    return [size for size in FLASH_3_HEAD_SIZES if not flags.get(f"FLASHATTENTION_DISABLE_HDIM{size}")]


def fp8_recipes(capability: tuple[int, int]) -> list[str]:
    """The values of model.fp8_recipe that a GPU can run."""
    return [name for name, least in FP8_CAPABILITIES.items() if capability >= least]


def _other_recipes(capability: tuple[int, int]) -> str:
    possible = fp8_recipes(capability)
    return f", or set model.fp8_recipe={' or '.join(possible)}" if possible else ""


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
