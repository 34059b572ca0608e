"""A checkpoint must hold exactly the tensors that are to be loaded, under the same names and in the same shapes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import __version__ as megatron_version
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from packaging.version import Version

from soar_mega.checkpoints.checkpoint import FAILURES, reason
from soar_mega.distributed import gather_on_rank_zero
from soar_mega.engines.kept_weights import MAIN_COPIES
from soar_mega.faults.agreement import on_rank_zero

NAMED = 20  # of the things that are wrong, in an error message
COMMON_STATE = "common_state"  # megatron-core 0.19 keeps under this key what 0.16 to 0.18 keep in common.pt
EXTRA_STATE = "_extra_state"  # Transformer Engine's, which is made anew

Shapes = Mapping[str, tuple[int, ...] | None]  # of whole tensors by name; None for what is no tensor


def check_keys(folder: Path, state: dict[str, Any]) -> None:
    """Compares a checkpoint with all that the ranks together want to load from it. Collective.

    Where no name of a group (the model, the optimizer, one kept copy of the weights, or a collection that is learned
    from) is wanted, what the checkpoint holds of that group does not matter.

    Raises:
        ValueError: on rank 0, PeerFailure on the others, when names or shapes differ; lists them by group.
    """
    sharded, _ = extract_sharded_base(load_preprocess(state)[0])
    mine = {base.key: _shape(base) for base in nested_values(sharded)}
    wanted = {key: shape for part in gather_on_rank_zero(mine) for key, shape in part.items()}
    on_rank_zero(lambda: _refuse_differences(folder, wanted))


def held_names(folder: Path) -> set[str]:
    """The names of all that a checkpoint holds. ValueError where it cannot be read."""
    return {base.key for base in _held(folder)}


def differences(saved: Shapes, wanted: Shapes) -> list[str]:
    """What a checkpoint lacks, has too much or has in another shape: a line for each of these in each group."""
    groups = sorted({_group(key) for key in wanted})
    lines = []
    for group in groups:
        there = {
            key for key in saved if _group(key) == group and not key.endswith((EXTRA_STATE, COMMON_STATE))
        }
        here = {key for key in wanted if _group(key) == group}
        missing, extra = sorted(here - saved.keys()), sorted(there - here)
        shapes = [
            f"{key} ({_words(saved[key])} there, {_words(wanted[key])} here)"
            for key in sorted(here & saved.keys())
            if saved[key] != wanted[key]
        ]
        kinds = (("missing", missing), ("not wanted", extra), ("of another shape", shapes))
        lines += [f"{group}: {len(names)} {kind}: {listed(names, ', ')}" for kind, names in kinds if names]
    return lines


def listed(lines: list[str], separator: str = "; ") -> str:
    """The lines in one, up to a limit."""
    more = f"{separator}and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
    return separator.join(lines[:NAMED]) + more


def _refuse_differences(folder: Path, wanted: Shapes) -> None:
    held = _held(folder)
    if any(base.key == COMMON_STATE for base in held) and Version(megatron_version) < Version("0.19"):
        raise ValueError(
            f"{folder} was written with megatron-core 0.19 or newer, and {megatron_version}, which is installed here, "
            "cannot read it: resume where that version is (it needs Python 3.12 or newer)"
        )
    found = differences({base.key: _shape(base) for base in held}, wanted)
    if found:
        advice = (
            "resume with the recipe that wrote it, or start from its weights with checkpoint.finetune=true"
        )
        raise ValueError(f"{folder} does not hold what this run consists of ({advice}). {listed(found)}")


def _held(folder: Path) -> list[Any]:
    try:
        return list(load_sharded_metadata(str(folder)).values())
    except FAILURES as error:
        raise ValueError(f"{folder}: this checkpoint cannot be read ({reason(error)})") from error


def _group(key: str) -> str:
    if key.startswith(tuple(f"{prefix}." for prefix in MAIN_COPIES)):
        return "main copies of the weights"
    if key.startswith("optimizer."):
        return "optimizer"
    if key.startswith("experience."):
        return "experience"
    return ".".join(key.split(".")[:2]) if key.startswith("weights.") else "model"


def _shape(base: Any) -> tuple[int, ...] | None:
    return tuple(base.global_shape) if isinstance(base, ShardedTensor) else None


def _words(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else " x ".join(map(str, shape)) or "a number"
