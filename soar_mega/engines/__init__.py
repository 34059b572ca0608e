"""Engines run any stage on hardware: they know processes, memory and optimizers, and nothing of a training method."""

from soar_mega.config import Recipe
from soar_mega.engines.engine import Engine, StepResult
from soar_mega.engines.megatron import MegatronEngine
from soar_mega.models.common.sizes import Sizes


def make_engine(recipe: Recipe, config: Sizes) -> Engine:
    """The engine that a recipe names, with the model of `config` in it; the world must have been started."""
    if recipe.parallel.engine == "megatron":
        return MegatronEngine(recipe, config)
    if recipe.parallel.engine == "deepspeed":
        from soar_mega.engines.deepspeed import DeepSpeedEngine  # DeepSpeed takes seconds to import

        return DeepSpeedEngine(recipe, config)
    raise ValueError(f"parallel.engine: {recipe.parallel.engine!r} is unknown; choose megatron or deepspeed")


__all__ = ["Engine", "MegatronEngine", "StepResult", "make_engine"]
