"""Adapters as files, in PEFT's and in diffusers' format: written, read, started from, merged.

PEFT: adapter_model.safetensors with keys below base_model.model., and adapter_config.json, which holds rank and alpha.
diffusers: pytorch_lora_weights.safetensors with keys below transformer., rank and alpha in the file's metadata.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save
from torch import Tensor
from torch.nn import Module

from soar_mega.config import LoraConfig
from soar_mega.convert.export import replacing
from soar_mega.convert.finite_tensors import is_finite
from soar_mega.convert.load import load_diffusers
from soar_mega.convert.safetensors_reader import open_file
from soar_mega.convert.save import on_rank_zero
from soar_mega.models.common.gather import full_tensor, local_shard
from soar_mega.models.common.lora import Adapters, Pair, add_adapters, alpha
from soar_mega.models.common.transformer import Transformer
from soar_mega.user_files import number, read_object

PEFT_FILE, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
DIFFUSERS_FILE, DIFFUSERS_PREFIX = "pytorch_lora_weights.safetensors", "transformer."
METADATA = "lora_adapter_metadata"  # under which diffusers keeps a configuration in the file
SHOWN = 5  # of the names that are wrong
# settings of PEFT whose adapters compute something else, with what they are where they do nothing
PLAIN: dict[str, Any] = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
# beginnings of PEFT's init_lora_weights that take something out of the weights which the adapters are on
CHANGE_WEIGHTS = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraFile:
    """Adapters as they are stored.

    Attributes:
        path: of the safetensors file.
        keys: its keys by ours: module.lora_A.weight, without a prefix.
        shapes: of its tensors by our keys.
    """

    path: Path
    rank: int
    alpha: float
    keys: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @property
    def modules(self) -> list[str]:
        """diffusers' names of the adapted linears."""
        return sorted({key.rsplit(".", 2)[0] for key in self.keys})

    def config(self) -> LoraConfig:
        """The settings of these adapters."""
        return LoraConfig(rank=self.rank, alpha=self.alpha, targets=self.modules)


def open_lora(path: str | Path) -> LoraFile:
    """Find and describe adapters; of the file only the header is read.

    Args:
        path: a safetensors file, or a folder with one of both formats, or with such a folder named lora, as in the
            checkpoints of flow_grpo and DiffusionNFT.

    Raises:
        ValueError: no such file, one that is damaged, or adapters of another kind; the message names it.
    """
    file = _file(Path(path))
    with open_file(file) as opened:
        metadata = opened.metadata() or {}
        stored = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    keys = {key.removeprefix(PEFT_PREFIX).removeprefix(DIFFUSERS_PREFIX): key for key in stored}
    shapes = {key: stored[original] for key, original in keys.items()}
    strange = [key for key in keys if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange or not keys:
        found = ", ".join(keys[key] for key in strange[:SHOWN]) or "nothing"
        raise ValueError(
            f"{file} holds {found}: expected are A and B of a transformer's linears under PEFT's names, as "
            f"{DIFFUSERS_PREFIX}transformer_blocks.0.attn.to_q.lora_A.weight"
        )
    ranks = {shape[0] if shape else 0 for key, shape in shapes.items() if key.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise ValueError(f"{file} has adapters of ranks {sorted(ranks)}: here all have the same rank")
    settings = _settings(file, metadata, is_peft=all(key.startswith(PEFT_PREFIX) for key in stored))
    for name, plain in PLAIN.items():
        if settings.get(name, plain) not in (plain, None):
            raise ValueError(f"{file}: its adapters have {name}={settings[name]!r}, which is not known here")
    if (kind := str(settings.get("init_lora_weights")).lower()).startswith(CHANGE_WEIGHTS):
        raise ValueError(
            f"{file}: its adapters have init_lora_weights={kind!r}, so they are on changed weights and not on those of "
            "a pipeline: let PEFT save them with path_initial_model_for_weight_conversion"
        )
    [rank] = ranks
    said = settings.get("r", rank)
    if said != rank:
        raise ValueError(f"{file}: its configuration says rank {said}, its tensors have rank {rank}")
    return LoraFile(file, rank, number({"lora_alpha": rank, **settings}, "lora_alpha", file), keys, shapes)


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    for folder in (path, path / "lora"):
        for name in (PEFT_FILE, DIFFUSERS_FILE):
            if (folder / name).is_file():
                return folder / name
    raise ValueError(
        f"{path} holds no adapters: expected {PEFT_FILE} or {DIFFUSERS_FILE}, or such a file itself"
    )


def _settings(file: Path, metadata: dict[str, str], is_peft: bool) -> dict[str, Any]:
    """PEFT's configuration, from beside the file in PEFT's format or from within one in diffusers'.

    Of the latter it is empty where there is none: diffusers then takes alpha to be the rank. PEFT takes nothing.
    """
    if is_peft:
        return read_object(file.parent / PEFT_CONFIG, "the alpha of the adapters beside it is there")
    if METADATA not in metadata:
        return {}
    try:
        found = json.loads(metadata[METADATA])
        return {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in found.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: its metadata under {METADATA} is no JSON object") from error


@torch.no_grad()
def load_adapters(model: Module, adapters: Adapters, config: LoraConfig, path: str | Path) -> None:
    """Fill this rank's adapters from files.

    Raises:
        ValueError: another rank, alpha or other targets than the configuration's, a tensor of another shape or one with
            NaN.
    """
    stored = open_lora(path)
    for name, there, here in (("rank", stored.rank, config.rank), ("alpha", stored.alpha, alpha(config))):
        if there != here:
            raise ValueError(f"lora.load: {stored.path} has {name} {there:g}: set lora.{name}={there:g}")
    wanted = {e.keys[0]: e for pair in adapters.pairs for e in pair.entries(config.rank)}
    missing, extra = sorted(wanted.keys() - stored.keys.keys()), sorted(stored.keys.keys() - wanted.keys())
    if missing or extra:
        parts = [
            f"{len(k)} {what}: {', '.join(k[:SHOWN])}"
            for k, what in ((missing, "missing"), (extra, "unknown"))
            if k
        ]
        raise ValueError(f"lora.load: {stored.path} does not fit lora.targets; {'; '.join(parts)}")
    held = dict(model.named_parameters())
    with open_file(stored.path) as opened:
        for key, entry in wanted.items():
            tensor = opened.get_tensor(stored.keys[key])
            if tuple(tensor.shape) != entry.shape:
                raise ValueError(
                    f"lora.load: {key} in {stored.path} is {tuple(tensor.shape)}, this model has {entry.shape}"
                )
            if not is_finite(tensor):
                raise ValueError(f"lora.load: {key} in {stored.path} holds NaN or infinite numbers")
            if entry.name in held:
                held[entry.name].copy_(local_shard(tensor, held[entry.name]))


def save_adapters(
    model: Module,
    adapters: Adapters,
    config: LoraConfig,
    folder: str | Path,
    tensors: Callable[[str], Tensor] | None = None,
    base: str = "",
) -> None:
    """Write adapters in both formats into one folder. A collective over the whole world.

    The folder appears under its name only when it is complete; an older one that this program wrote is replaced.

    Args:
        tensors: this rank's shard by global name, in place of the model's own (an EMA).
        base: the pipeline folder of the weights that they were trained on; PEFT keeps its name.

    Raises:
        ValueError: the folder holds what this program did not write.
        OSError: rank 0 could not write. Both are raised on every rank.
    """
    held = dict(model.named_parameters())
    value = tensors or held.__getitem__
    mine = {name: full_tensor(value(name), like=held[name]).cpu() for name in adapters.names}
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    stages: list[dict[str, Tensor]] = [{} for _ in range(pipeline.size())]
    dist.all_gather_object(stages, mine, group=pipeline)
    whole = {name: tensor for stage in stages for name, tensor in stage.items()}
    stored = {e.keys[0]: whole[e.name].contiguous() for p in adapters.pairs for e in p.entries(config.rank)}
    with replacing(folder) as new:
        on_rank_zero(lambda: _write(new, stored, adapters.pairs, config, base), folder)


def _write(folder: Path, stored: dict[str, Tensor], pairs: list[Pair], config: LoraConfig, base: str) -> None:
    settings = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": alpha(config),
        "lora_dropout": config.dropout,
        "target_modules": [pair.module for pair in pairs],
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
    }
    more = {"base_model_name_or_path": base or None, "inference_mode": True, "task_type": None}
    (folder / PEFT_CONFIG).write_text(json.dumps(settings | more, indent=2) + "\n")
    # not save_file: what that writes only its owner can read, whatever the umask
    (folder / PEFT_FILE).write_bytes(save(_below(PEFT_PREFIX, stored), {"format": "pt"}))
    # diffusers does not put what it loads into evaluation mode: with dropout it would draw without some features
    drawing = settings | {"lora_dropout": 0.0}
    kept = {f"{DIFFUSERS_PREFIX}{key}": value for key, value in drawing.items() if key != "peft_type"}
    metadata = {"format": "pt", METADATA: json.dumps(kept)}
    (folder / DIFFUSERS_FILE).write_bytes(save(_below(DIFFUSERS_PREFIX, stored), metadata))


def _below(prefix: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in stored.items()}


def load_adapted(folder: str | Path, lora: str | Path, dtype: str = "fp32") -> tuple[Transformer, Adapters]:
    """A pipeline's transformer in one process with adapters on it: `load_diffusers` and `load_adapters`.

    Raises:
        ValueError: as both.
    """
    config = open_lora(lora).config()
    model = load_diffusers(folder, dtype)
    adapters = add_adapters([model], config, seed=0)
    load_adapters(model, adapters, config, lora)
    return model, adapters
