"""What an engine holds on a rank, of all tensors that are alive; importable by other processes."""

import gc

import torch
from engine_cases import SIZES, iterate, make_batch, start_engine
from live_bytes import LiveBytes

from soar_mega.config import Recipe
from soar_mega.models.sd3.sizes import SD3Sizes
from soar_mega.stages import make_stage


def storages(tensors) -> dict[int, int]:
    """Bytes by address of what is behind tensors, counted once."""
    real = [t for t in tensors if t.layout == torch.strided and not t.is_meta]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in real}


def held_bytes(recipe: Recipe, sizes: SD3Sizes = SIZES) -> dict[str, int]:
    """After the gradients of a second step: bytes of all tensors made since before the engine was, by kind."""
    stage = make_stage(recipe.stage, shift=1.0)
    with LiveBytes() as counted:
        engine = start_engine(recipe, sizes)
        if recipe.train.ema_decay:
            engine.keep_weights("ema")
        for name in recipe.stage.kept_copies:
            engine.keep_weights(name)
        iterate(engine, stage, make_batch(0, recipe.train.global_batch_size))
        batch = make_batch(1, recipe.train.global_batch_size)
        engine.learn(stage.points, stage.loss, batch, engine.answer(stage.queries, batch))
        del batch, engine.learned
        gc.collect()
        found = counted.now

    parameters = list(engine.parameters.values())
    parts = [getattr(p, "ds_tensor", p) for p in parameters]
    weights = storages([*parts, *engine.model.buffers()])
    kept = storages([piece for copy in engine.weights.values() for piece in copy.pieces.values()])
    inner = [
        getattr(one, "optimizer", one)
        for one in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    ]
    moments = [
        x
        for one in inner
        for state in one.state.values()
        for x in state.values()
        if isinstance(x, torch.Tensor)
    ]
    mains = [piece.main for piece in engine._main.pieces.values()]
    optimizer = {a: n for a, n in storages([*moments, *mains]).items() if a not in weights}
    kinds = {"weights": weights, "optimizer": optimizer, "kept": kept}
    held = {kind: sum(parts.values()) for kind, parts in kinds.items()}
    return held | {"gradients": found - sum(held.values())}
