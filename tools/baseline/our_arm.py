"""soar_mega as an arm of a comparison. Everything is imported before the arm is built: imports are not its
memory.
"""

from typing import Any

import torch
from baseline.case import LEARNING_RATE, Case, make_samples
from device_weights import drawn_on_device

from soar_mega import platform
from soar_mega.config import ModelConfig, OptimizerConfig, Recipe, TrainConfig
from soar_mega.data.batch import Batch
from soar_mega.distributed import device, start_world, stop_world
from soar_mega.engines import make_engine
from soar_mega.models.family import read_sizes
from soar_mega.stages import make_stage


class OurArm:
    """soar_mega's stage and engine, single process."""

    def __init__(
        self,
        case: Case,
        micro_batch_size: int,
        points_per_micro_batch: int,
        cuda_graphs: str = "none",
        model: dict[str, Any] | None = None,
    ) -> None:
        """model: further settings of the recipe's group of that name."""
        platform.install()
        stop_world()  # of the arm before
        recipe = Recipe(
            model=ModelConfig(
                pipeline_dir=case.pipeline_dir,
                init="pretrained" if case.pipeline_dir else "random",
                dtype=case.dtype,
                **{"recompute_granularity": "full" if case.recompute else "none"} | (model or {}),
            ),
            stage=case.stage,
            train=TrainConfig(
                global_batch_size=case.batch_size,
                micro_batch_size=micro_batch_size,
                points_per_micro_batch=points_per_micro_batch,
                cuda_graphs=cuda_graphs,
            ),
            optimizer=OptimizerConfig(lr=LEARNING_RATE),
        )
        start_world(recipe.parallel)
        assert case.stage.shift is not None
        self.stage = make_stage(case.stage, case.stage.shift)
        with drawn_on_device():
            self.engine = make_engine(recipe, read_sizes(case.transformer))
        self.samples = make_samples(case, device())
        self.latent_shape, self.consumed = case.latent_shape, 0

    def step(self) -> None:
        batch = self.batch()
        answers = self.engine.answer(self.stage.queries, batch)
        self.engine.learn(self.stage.points, self.stage.loss, batch, answers)
        self.engine.step(LEARNING_RATE)

    def batch(self) -> Batch:
        s = self.samples
        count = len(s.latents)
        position = self.consumed + torch.arange(count)
        self.consumed += count
        return Batch(
            seed=0,
            position=position,
            valid=torch.ones(count, dtype=torch.bool),
            latent_shape=self.latent_shape,
            text_length=s.text.shape[1],
            latents=s.latents,
            text=s.text,
            pooled=s.pooled,
            empty_text=s.empty_text,
            empty_pooled=s.empty_pooled,
        )
