"""What the DeepSpeed engine is compared in with megatron's, importable by other processes."""

from pathlib import Path

import torch
from engine_cases import POOLED, SHAPE, TEXT, TEXT_DIM, iterate, make_batch, make_recipe, start_engine, step

from soar_mega.checkpoints.rank_file import save_tensors
from soar_mega.checkpoints.reading import read_tensors
from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.gather import full_tensor
from soar_mega.models.common.names import global_parameter_names
from soar_mega.stages import make_stage

PATTERNS = {  # frozen parameters, learning rates and groups without decay
    "frozen": ["pos_embed*", "layers.0.*"],
    "lr_multipliers": {"layers.2.*": 0.1},
    "weight_decay": 0.1,
    "decay_all": False,
}


def zero_recipe(zero_stage: int, tensor_parallel: int = 1, **settings):
    """Few micro-batches, for they cost time, but more than one and with a tail that has to be filled up."""
    train = {"points_per_micro_batch": 7}
    return make_recipe(
        (tensor_parallel, 1), train=train, engine="deepspeed", zero_stage=zero_stage, **settings
    )


def megatron_recipe(tensor_parallel: int = 1, **settings):
    return make_recipe((tensor_parallel, 1), train={"points_per_micro_batch": 7}, **settings)


def whole(engine, weights):
    """All parameters in the single-process layout."""
    tensors = engine.tensors(weights)
    return {name: full_tensor(tensors(name), like=p).clone() for name, p in engine.parameters.items()}


def behaviour(recipe) -> dict:
    """All that an engine can be asked for, in numbers."""
    engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
    drawn = torch.Generator().manual_seed(0)
    latents, text, pooled = (
        torch.randn(2, *shape, generator=drawn) for shape in (SHAPE, (TEXT, TEXT_DIM), (POOLED,))
    )
    found: dict = {}

    def look(moment: str) -> None:
        for weights in ("current", *engine.weights):
            sigma = torch.full((2,), 0.5)
            velocity = engine.velocity(latents, sigma, Conditions(text, pooled), weights=weights)
            found[f"{moment}: velocity by {weights}"] = velocity

    def learn(iteration: int, loss=stage.loss, weights: str = "current") -> None:
        batch = make_batch(iteration)
        answers = engine.answer(stage.queries, batch, weights=weights)
        engine.learn(stage.points, loss, batch, answers)

    engine.keep_weights("old")
    engine.keep_weights("ema")
    norms = [iterate(engine, stage, make_batch(i))[1].grad_norm for i in range(2)]
    look("after two steps")
    learn(2)  # gradients that no step uses
    learn(2, weights="ema")
    norms.append(step(engine).grad_norm)
    look("after answers by the ema")
    learn(3, loss=lambda points, velocity: stage.loss(points, velocity) + float("inf"))
    assert not engine.step(1e-3).ok
    learn(3, loss=lambda points, velocity: stage.loss(points, velocity) * float("nan"))
    assert not engine.step(1e-3).ok
    look("after steps that are not finite")
    norms.append(iterate(engine, stage, make_batch(4))[1].grad_norm)
    found["ema"], found["current"] = whole(engine, "ema"), whole(engine, "current")
    return found | {"norms": norms, "step": max(g["step"] for g in groups(engine))}


def groups(engine):
    return engine.sharded_state_dict()["optimizer"]["optimizer"]["param_groups"]


def link(recipe, loaded: str | None, saved: str, iterations: range) -> tuple[list[float], dict]:
    """Some iterations between two checkpoints: losses and gradient norms, and the EMA at the end."""
    engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
    engine.keep_weights("ema")
    if loaded is not None:
        blank = {name: torch.zeros(p.shape) for name, p in global_parameter_names(engine.layout).items()}
        engine.load_weights({"model": blank})
        engine.load_state_dict(read_tensors(Path(loaded), engine.sharded_state_dict(is_loading=True)))
    numbers: list[float] = []
    for i in iterations:
        statistics, result = iterate(engine, stage, make_batch(i))
        numbers += [statistics["loss"], result.grad_norm]
    save_tensors(engine.sharded_state_dict(), saved)
    return numbers, whole(engine, "ema")
