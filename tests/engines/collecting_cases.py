"""A small method that learns from samples of its own, with all that such methods ask of an engine.

Its points are guided, their loss reads answers of two kept copies, rows share prompts, and it observes. Importable by
other processes.
"""

from dataclasses import replace

import torch
from engine_cases import (
    POOLED,
    SHAPE,
    SIZES,
    TEXT,
    TEXT_DIM,
    make_recipe,
    random_tensor,
    settings_of_soar,
    start_engine,
)

from soar_mega.config import LoraConfig, Recipe
from soar_mega.data.batch import Batch
from soar_mega.distributed import data_rank, data_size
from soar_mega.flow import Schedule, normal
from soar_mega.models.common.names import global_parameter_names
from soar_mega.models.sd3.sizes import SD3Sizes
from soar_mega.stages import SftConfig
from soar_mega.stages.points import Further, Points, Queries

GUIDANCE, REFERENCE_GUIDANCE = 3.0, 2.0
SAMPLES = 4  # of a global batch, each with two rows
LORA = LoraConfig(
    rank=2, alpha=3.0, targets=["*.attn.to_[qv]", "*.attn.to_out.0", "*.ff.net.*", "*norm1.linear"]
)


class Collecting:
    """A clipped policy loss of steps between two rows, a penalty by the reference, and a pull by the old weights."""

    kinds = ("step", "noisy")
    schedule = Schedule(3.0)
    answer_weights = "current"
    keeps = ("old", "reference")
    observes = ("ratio", "kl")

    def __init__(self, detach: bool = False) -> None:
        self.detach = detach
        self.further = {
            "reference": Further("reference", self._asked(guided=True)),
            "old": Further("old", self._asked(guided=False)),
        }

    def queries(self, batch: Batch) -> Queries | None:
        return None

    def _asked(self, guided: bool):
        def queries(batch: Batch) -> Queries:
            return self.points(batch).take(self._place(batch)).asked(unconditional=guided)

        return queries

    @staticmethod
    def _place(batch: Batch) -> torch.Tensor:
        """Queries are in another order than points."""
        return torch.arange(2 * len(batch)).flip(0)

    def points(self, batch: Batch) -> Points:
        """Each row as it is, and with the noise of a path on it."""
        row = torch.arange(len(batch)).repeat(2)
        path = torch.arange(2).repeat_interleave(len(batch))
        state = batch.collected["state"][row]
        sigma = 0.2 + 0.15 * batch.position[row] + 0.1 * state + 0.05 * path.double()
        rows = torch.zeros(len(row), 6, dtype=torch.float64)
        rows[:, 0], rows[:, 4] = 1.0, 0.3 * path
        present = batch.valid[row].double()
        return Points(
            kinds=self.kinds,
            sample=row,
            path=path,
            kind=path,
            query=row,
            sigma=sigma,
            timestep=self.schedule.timestep(sigma),
            state_rows=rows,
            target_rows=rows,
            dropped=(batch.position[row] == 0) & (state == 1) & (path == 1),
            weight=present * (1.0 + 0.5 * path),
            count=present,
            extra={name: column[row] for name, column in batch.collected.items()},
            reads={name: self._place(batch) for name in self.further},
            guidance_scale=GUIDANCE,
            detach_unconditional=self.detach,
        )

    def log_probability(self, points: Points, velocity: torch.Tensor) -> torch.Tensor:
        assert points.sources is not None
        following = points.sources.z0.index_select(0, points.extra["following"])
        return log_probability(points.targets(), following, velocity)

    def loss(self, points: Points, velocity: torch.Tensor) -> torch.Tensor:
        reference, old = points.answered["reference"], points.answered["old"]
        assert old.uncond is None
        by_reference = reference.uncond + REFERENCE_GUIDANCE * (reference.cond - reference.uncond)
        found = objective(
            self.log_probability(points, velocity), points.extra, velocity, by_reference, old.cond
        )
        points.observed |= {name: found[name].detach() for name in self.observes}
        return found["loss"]


def log_probability(state, following, velocity):
    """[M] of a step from `state` to `following`, without what does not depend on the weights."""
    return -(following - state + 0.2 * velocity).square().mean(dim=(1, 2, 3))


def objective(now, extra, velocity, by_reference, by_old):
    """[M] each, in the type of the velocity."""
    ratio = (now - extra["old_log_probability"]).exp()
    advantage = extra["advantage"]
    policy = -torch.minimum(advantage * ratio, advantage * ratio.clamp(0.7, 1.4))
    kl = (velocity - by_reference).square().mean(dim=(1, 2, 3))
    pulled = (0.7 * velocity + 0.3 * by_old).square().mean(dim=(1, 2, 3))
    return {"loss": policy + 0.3 * kl + 0.1 * pulled, "ratio": ratio, "kl": kl}


def collected_batch() -> Batch:
    """This rank's share of the samples, two rows each; two samples share a prompt, one could not be judged."""
    share = SAMPLES // data_size()
    sample = (torch.arange(share) + share * data_rank()).repeat_interleave(2)
    prompts, prompt = (sample // 2).unique(return_inverse=True)
    prompts, prompt = prompts.flip(0), len(prompts) - 1 - prompt  # rows of prompts are in no order
    state = torch.arange(2).repeat(share)
    latents = 0.5 * normal(11, "latents", 2 * sample + state, 0, SHAPE)
    valid = sample != 1
    latents[~valid] = torch.nan
    empty = normal(11, "empty", torch.zeros(1, dtype=torch.int64), 0, (TEXT + 1, TEXT_DIM))[0]
    return Batch(
        seed=5,
        position=sample,
        valid=valid,
        latent_shape=SHAPE,
        text_length=TEXT,
        latents=latents,
        text=normal(11, "text", prompts, 0, (TEXT, TEXT_DIM)),
        pooled=normal(11, "pooled", prompts, 0, (POOLED,)),
        empty_text=empty[:TEXT],
        empty_pooled=empty[TEXT, :POOLED],
        prompt=prompt,
        collected={
            "state": state,
            "following": torch.arange(2 * share).view(-1, 2).flip(1).flatten(),
            "advantage": 1.5 - sample.double() + 0.2 * state,
            "old_log_probability": -0.1 * sample.double() - 0.3,
        },
    )


def with_kept_weights(recipe: Recipe, sizes: SD3Sizes = SIZES):
    """An engine whose weights, old weights and reference differ."""
    engine = start_engine(recipe, sizes)
    shapes = global_parameter_names(engine.layout)
    if engine.adapters is not None:
        shapes = {name: p for name, p in shapes.items() if name in engine.adapters.names}

    def load(factor: float) -> None:
        engine.load_weights({"model": {name: factor * random_tensor(name, p) for name, p in shapes.items()}})

    engine.keep_weights("old")
    engine.keep_weights("reference")
    load(1.1)
    engine.blend_weights("old", 0.25)
    load(0.9)
    return engine


def answered(engine, stage, batch):
    return {
        name: engine.answer(queries, batch, weights) for name, (weights, queries) in stage.further.items()
    }


def learn_once(engine, stage, batch):
    return engine.learn(
        stage.points, stage.loss, batch, None, stage.observes, **answered(engine, stage, batch)
    )


def collecting_case(recipe: Recipe) -> dict:
    """What one step gives, and the log-probabilities that were measured before it."""
    engine, stage, batch = with_kept_weights(recipe), Collecting(), collected_batch()
    measured = engine.measure(stage.points, stage.log_probability, batch)
    statistics = learn_once(engine, stage, batch)
    gradients, (_, losses) = engine.gradients(), engine.learned
    again = engine.measure(stage.points, stage.loss, batch, **answered(engine, stage, batch))
    assert losses is None or torch.equal(again, losses)  # what learning sees, to the last bit
    assert all(torch.equal(kept, gradients[name]) for name, kept in engine.gradients().items())
    return {"statistics": dict(statistics), "gradients": gradients, "measured": measured}


def collecting_recipe(layout=(1, 1), lora: LoraConfig | None = None, **settings) -> Recipe:
    """Micro-batches with a tail that has to be filled up."""
    train = {"global_batch_size": 2 * SAMPLES, "micro_batch_size": 3, "points_per_micro_batch": 3}
    settings = {"train": train} | settings
    recipe = make_recipe(layout, stage=settings_of_soar(SftConfig), **settings)
    return recipe if lora is None else replace(recipe, lora=lora)
