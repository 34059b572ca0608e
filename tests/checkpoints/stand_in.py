"""A stand-in engine of one tensor and its average, and its checkpoints."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from soar_mega.checkpoints.checkpoint import Progress, Saver
from soar_mega.checkpoints.resume import resume
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import CheckpointConfig

MODEL = {"num_layers": 4, "qk_norm": None, "dual_attention_layers": [0]}


class Weights:
    """An engine of one tensor and its average."""

    def __init__(self, value: float = 0.0, size: int = 4) -> None:
        self.current = torch.full((size,), value)
        self.ema = torch.full((size,), value + 100.0)
        self.weights = {"ema": self.ema}

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        held = {"current": self.current, "ema": self.ema}
        return {
            name: self._sharded(name, torch.empty_like(tensor) if is_loading else tensor)
            for name, tensor in held.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.current.copy_(state["current"])
        self.ema.copy_(state["ema"])

    def weights_state_dict(self, name: str) -> dict[str, Any]:
        return {"model": {"weights": self._sharded(name, torch.empty_like(self.current))}}

    def load_weights(self, state: dict[str, Any]) -> None:
        self.current.copy_(dict(state["model"].items())["weights"])

    def _sharded(self, name: str, data: torch.Tensor) -> ShardedTensor:
        """Each rank has its own part of the whole."""
        key = "current" if name == "current" else f"weights.{name}"
        return ShardedTensor.from_rank_offsets(key, data, (0, dist.get_rank(), dist.get_world_size()))


def progress(iteration: int) -> Progress:
    return Progress(iteration=iteration, consumed_samples=8 * iteration, loader={"consumed": 8 * iteration})


def save(run: RunFolder, iteration: int, size: int = 4, **settings: Any) -> None:
    """A whole checkpoint, by default written in the background."""
    run.path.mkdir(parents=True, exist_ok=True)
    saver = Saver(run, CheckpointConfig(**{"keep_last": 0} | settings), MODEL)
    saver.save(Weights(float(iteration), size), progress(iteration))
    saver.finish()


def load(run: RunFolder, **settings: Any) -> tuple[Progress, Weights]:
    engine = Weights()
    return resume(run, CheckpointConfig(**settings), engine, MODEL), engine


def check_usable(run: RunFolder, iterations: set[int]) -> int:
    """The folder resumes from one of `iterations` with that iteration's content."""
    found, engine = load(run)
    assert found.iteration in iterations
    assert found.loader == {"consumed": 8 * found.iteration}
    assert engine.current.tolist() == [float(found.iteration)] * 4
    assert engine.ema.tolist() == [found.iteration + 100.0] * 4
    return found.iteration


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())
