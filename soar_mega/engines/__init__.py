"""Engines run any stage on hardware: they know processes, memory and optimizers, and nothing of a training method."""

from soar_mega.config import Recipe
from soar_mega.engines.megatron import MegatronEngine, StepResult
from soar_mega.models.config import MMDiTConfig


def make_engine(recipe: Recipe, config: MMDiTConfig) -> MegatronEngine:
    """The engine that a recipe names, with the model of `config` in it; the world must have been started."""
    if recipe.parallel.engine != "megatron":
        raise ValueError(
            f"parallel.engine: {recipe.parallel.engine!r} is unknown; the engine that exists is megatron"
        )
    return MegatronEngine(recipe, config)


__all__ = ["MegatronEngine", "StepResult", "make_engine"]
