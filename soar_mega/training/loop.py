"""A whole step of a run: answer, learn, update. Engine, data and progress are here, and nothing is written."""

import logging
from typing import cast

from soar_mega.checkpoints.adapters import ADAPTERS, describe
from soar_mega.checkpoints.resume import resume
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import Recipe
from soar_mega.convert import pipeline_schedule
from soar_mega.data.loader import Loader
from soar_mega.distributed import is_rank_zero
from soar_mega.engines import StepResult, make_engine
from soar_mega.engines.statistics import StepStatistics
from soar_mega.models.common.flops import image_tokens
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.family import model_sizes
from soar_mega.phases import phases
from soar_mega.stages import make_stage
from soar_mega.stages.collecting import CollectingStage
from soar_mega.stages.points import Stage
from soar_mega.training.collector import Collection, Collector, Watch
from soar_mega.training.learning_rate import learning_rate

logger = logging.getLogger(__name__)


def make_loader(recipe: Recipe) -> Loader | Collector:
    """The samples of a run, from its first on."""
    model, train = recipe.model, recipe.train
    if recipe.stage.collects:
        # its rewards bring what most runs do not need
        from soar_mega.training.collector_inputs import make_collector

        return make_collector(recipe)
    sizes = model_sizes(model)
    return Loader(
        recipe.data, train.seed, train.global_batch_size, pipeline_dir=model.pipeline_dir, sizes=sizes
    )


class Steps:
    """A run at some iteration, and how it goes on. Everything is collective over the world.

    Args:
        run: resumed from when it holds a checkpoint.
        loader: as `make_loader` made it.
    """

    def __init__(self, recipe: Recipe, run: RunFolder, loader: Loader | Collector) -> None:
        self.recipe = recipe
        sizes = model_sizes(recipe.model)
        self.sizes = sizes.to_diffusers()
        self.loader = loader
        self._stages: dict[tuple[int, int], Stage] = {}  # by the latents' size
        info = loader.info
        self.stage = self._stage_of(info.latent_shape(info.largest_bucket), sizes)
        self.engine = make_engine(recipe, sizes)
        self._keep_weights()
        # a checkpoint holds adapters alone, and loading compares what they are
        if self.engine.base is not None:
            self.sizes |= {ADAPTERS: describe(recipe.lora, self.engine.base)}
        self.collector = loader if isinstance(loader, Collector) else None
        self.progress = resume(run, recipe.checkpoint, self.engine, self.sizes, self.collector)
        self._tell_of_lost_history()
        if isinstance(loader, Collector):
            loader.serve(self.engine, cast(CollectingStage, self.stage))
        elif self.progress.loader is not None:
            loader.load_state_dict(self.progress.loader)
        if self.progress.loader is None:
            self._keep_weights()  # those that checkpoint.finetune may have put in
        self.rate = 0.0  # of the last step

    def _stage_of(self, latent_shape: tuple[int, int, int], sizes: Sizes) -> Stage:
        """For latents [C, H, W]: pipelines may choose the shift by how many tokens an image has."""
        size = latent_shape[1:]
        if size not in self._stages:
            config = self.recipe.stage.asking(sizes.guidance_embeds)
            schedule = pipeline_schedule(
                self.recipe.model.pipeline_dir,
                image_tokens(sizes, size),
                samples_evenly=sizes.family.samples_evenly,
                shift=config.shift,
            )
            self._stages[size] = make_stage(config, schedule.shift, spacing=schedule.spacing)
        return self._stages[size]

    def _keep_weights(self) -> None:
        """Keeps the weights of now: as the EMA, where the recipe wants one, and as what the stage keeps."""
        if self.recipe.train.ema_decay > 0:
            self.engine.keep_weights("ema")
        for name in self.stage.keeps:
            self.engine.keep_weights(name)

    def _tell_of_lost_history(self) -> None:
        keeps_history = self.recipe.model.fp8_recipe == "delayed"
        if keeps_history and self.progress.iteration > 0 and is_rank_zero():
            logger.warning(
                "model.fp8_recipe=delayed: the history that its scales come from is in no checkpoint and begins anew, "
                "so the next steps are not exactly those of a run that did not stop (the other recipes keep none)"
            )

    def collect(self, watch: Watch = lambda drawn: False) -> Collection | None:
        """What comes before a step that has nothing left to learn from: the next collection.

        None where there is something, where samples come from a loader, or where `watch` says to stop.
        """
        if self.collector is None or not self.collector.is_empty:
            return None
        return self.collector.collect(watch)

    def learn(self) -> StepStatistics:
        """The first half of a step: its batch, what the model says now, and the gradients."""
        phases.enter("data")
        self.batch = next(self.loader)
        self.stage = self._stage_of(self.batch.latent_shape, self.engine.model.sizes)
        phases.enter("answer")
        stage, answer = self.stage, self.engine.answer
        answers = answer(stage.queries, self.batch, weights=stage.answer_weights)
        further = {
            name: answer(queries, self.batch, weights) for name, (weights, queries) in stage.further.items()
        }
        phases.enter("learn")
        return self.engine.learn(
            stage.points, stage.loss, self.batch, answers, observes=stage.observes, **further
        )

    def update(self) -> StepResult:
        """The second half: the weights, and the progress."""
        phases.enter("optimizer")
        progress, recipe = self.progress, self.recipe
        self.rate = learning_rate(recipe.optimizer, progress.iteration, recipe.train.train_iters)
        result = self.engine.step(self.rate)
        progress.iteration += 1
        progress.consumed_samples = self.loader.consumed_samples
        progress.skipped_steps += not result.ok
        if result.ok and recipe.train.ema_decay > 0:
            self._move_average()
        is_collection_over = self.collector is not None and self.collector.is_empty
        for name, decay in self.stage.blends(progress.iteration, is_collection_over).items():
            self.engine.blend_weights(name, decay)
        return result

    def _move_average(self) -> None:
        train, steps = self.recipe.train, self.progress.iteration
        decay = min(steps / (9 + steps), train.ema_decay) if train.ema_warm_up else train.ema_decay
        if steps % train.ema_update_interval == 0:
            self.engine.blend_weights("ema", decay)

    def close(self) -> None:
        """Ends reader processes."""
        self.loader.close()
