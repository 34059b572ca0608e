"""A model's own samples in the place of a loader's: drawn, judged, and handed out as batches.

A collection is drawn when the one before has been learned from. All ranks of a replica draw the samples that it learns
from; one of them decodes and judges, while the next ones are drawn; rewards alone travel. A sample's place in the
training sequence keys all of its noise, so what is drawn does not depend on the layout.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.parallel_state import get_pipeline_model_parallel_world_size
from torch import Tensor

from soar_mega.config import Recipe
from soar_mega.config_checks import check_replicas
from soar_mega.data.batch import Batch
from soar_mega.data.info import DatasetInfo, bucket_name
from soar_mega.data.prompt_files import PromptSet
from soar_mega.data.prompt_order import PromptOrder
from soar_mega.data.ranks import Ranks, this_rank
from soar_mega.distributed import device
from soar_mega.engines import Engine
from soar_mega.evaluation.drift import branches
from soar_mega.evaluation.scorer import TOTAL
from soar_mega.flow import guided
from soar_mega.flow.samplers import Velocity
from soar_mega.phases import phases
from soar_mega.stages import CollectingConfig
from soar_mega.stages.collecting import CollectingStage, Trajectories
from soar_mega.training.collection_place import Place
from soar_mega.training.drawing import draw
from soar_mega.training.experience import Experience, Share, order_of_pass
from soar_mega.training.judge_queue import Judge, Values, rewards_of_all
from soar_mega.training.prompt_texts import PromptTexts

logger = logging.getLogger(__name__)

Watch = Callable[[int], bool]  # told of samples drawn by all replicas; True: stop here


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What was made of a collection of N samples.

    Attributes:
        number: of the collection; the first one is 0.
        prompt: [N] int64, whose prompt a sample is drawn for: a number of the prompt set.
        rewards: [N] float64 each, by name; NaN where a sample could not be judged. advantages: likewise.
        seconds: that it took.
    """

    number: int
    prompt: Tensor
    rewards: Values
    advantages: Tensor
    seconds: float


class Collector:
    """Has the face of a `Loader`; between `serve` and `next` comes `collect`, whenever `is_empty`.

    Sample i of a collection is drawn for its prompt i % prompts_per_collection: a global batch has many prompts, and
    the samples of one are spread over the replicas.

    Attributes:
        place: of the run among its collections.

    Args:
        texts: the embeddings of the prompts.
        judge: on the one rank of each replica that judges, None on the others.
        size: (width, height) of images in pixels.
        validation: held-out prompts.
    """

    def __init__(
        self,
        recipe: Recipe,
        info: DatasetInfo,
        prompts: PromptSet,
        texts: PromptTexts,
        judge: Judge | None,
        size: tuple[int, int],
        validation: tuple[PromptSet, PromptTexts] | None = None,
    ) -> None:
        config = recipe.stage
        assert isinstance(config, CollectingConfig)
        self._config, self._seed, self.info = config, recipe.train.seed, info
        self.ranks: Ranks = this_rank()
        check_replicas(recipe.train.global_batch_size, self.ranks.data_size)
        self.prompts, self._texts, self.judge = prompts, texts, judge
        self._order = PromptOrder(self._seed, len(prompts), config.prompts_per_collection, prompts.path)
        self.place = Place(recipe, prompts)
        self._share = Share(
            updates=self.place.samples // recipe.train.global_batch_size,
            global_batch_size=recipe.train.global_batch_size,
            replica=self.ranks.data_rank,
            replicas=self.ranks.data_size,
        )
        self._latent_shape = info.latent_shape(bucket_name(*size))
        self.validation, self.forward_size = validation, config.collect_micro_batch_size
        self._held: Experience | None = None
        self._rows = torch.zeros(0, dtype=torch.int64)  # of the last batch, its prompts

    def serve(self, engine: Engine, stage: CollectingStage) -> None:
        """Whose samples are drawn, and what for."""
        self._engine, self._stage = engine, stage

    @property
    def is_empty(self) -> bool:
        """Whether all that was collected has been learned from."""
        return self._held is None

    @property
    def is_untouched(self) -> bool:
        """Whether something was collected of which nothing has been learned from."""
        return not self.is_empty and self.place.consumed_samples == self.place.position

    @property
    def _speaks(self) -> bool:
        """Whether this rank is the one of its replica that tells others what all of them hold."""
        return self.ranks.leader and self.ranks.first_stage

    @property
    def consumed_samples(self) -> int:
        """That were learned from in the whole run, each as often as it was, over all ranks."""
        return self.place.consumed_samples

    def collect(self, watch: Watch = lambda drawn: False) -> Collection | None:
        """Draws and judges the next collection. Collective over the world; not a part of a step.

        Args:
            watch: called between forwards with how many samples there are by now; where it says True on all ranks,
                nothing is kept.

        Raises:
            DataError: the rewards cannot be had, or those of too many samples; on all ranks alike.
        """
        assert self.is_empty
        started = time.perf_counter()
        group = self._order.of(self.place.collection)
        drawn: list[Trajectories] = []
        with self._engine.using(self._stage.collect_weights):
            for places, trajectories in self._drawn(group):
                drawn.append(trajectories)
                self._submit(places, trajectories.clean, group)
                done = sum(len(part.clean) for part in drawn) * self.ranks.data_size
                if watch(done):
                    if self.judge is not None:
                        self.judge.drop()
                    return None
        phases.leave_step("rewards")
        rewards = rewards_of_all(self.judge, self.place.samples)
        group_of_sample = torch.arange(self.place.samples) % len(group)
        self.place.count_not_judged(rewards[TOTAL], group[group_of_sample])
        advantages = self._stage.advantages(rewards, group_of_sample)
        self._held = Experience.of(self._share, drawn, advantages)
        if self._stage.replayed:
            self._replay()
        return Collection(
            number=self.place.collection,
            prompt=group[group_of_sample],
            rewards=rewards,
            advantages=advantages,
            seconds=time.perf_counter() - started,
        )

    def latents(self, places: Tensor) -> Tensor:
        """Clean latents [K, C, H, W] of the samples at `places` [K] of the collection that is held.

        Each on one rank of the replica that has it, and zero on all other ranks.
        """
        assert self._held is not None
        if not self._speaks:
            return torch.zeros(len(places), *self._latent_shape)
        clean = self._held.tensors["clean"].flatten(0, 1)
        mine = {place: row for row, place in enumerate(self._share.places().flatten().tolist())}
        found = torch.zeros(len(places), *self._latent_shape)
        for k, place in enumerate(places.tolist()):
            if place in mine:
                found[k] = clean[mine[place]]
        return found

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        count = self._share.global_batch_size
        taken = (self.place.consumed_samples - self.place.position) // count
        batch = self._batch(*divmod(taken, self._share.updates))
        self.place.consumed_samples += count
        if self.place.consumed_samples % self.place.learned_from == 0:
            self._held = None
        return batch

    def indices(self) -> list[int]:
        """Of the rows of the last batch, the prompts' numbers; on ranks that hold latents."""
        return self._rows.tolist()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on beside the tensors of `pieces`; plain values, equal on all ranks."""
        return self.place.state_dict() | {"held": None if self._held is None else self._held.shapes()}

    def pieces(self) -> list[Any]:
        """This rank's part of a checkpoint: of each replica one rank has it."""
        return self._held.pieces() if self._held is not None and self._speaks else []

    def wanted(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What to load of the checkpoint with that `state_dict`, by name; comes in at `load_state_dict`.

        Raises:
            ValueError: the run drew other prompts, by another seed, or collections of another size.
        """
        self.place.check(state, between=state.get("held") is None)
        if state["held"] is None:
            return {}
        self._held = Experience.empty(self._share, state["held"])
        return self._held.wanted()

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken, with what was loaded for `wanted`."""
        self.place.load_state_dict(state)
        if self._held is not None:
            self._held.tensors.update(tensors)

    def close(self) -> None:
        """Ends the judge's thread."""
        if self.judge is not None:
            self.judge.close()

    def _drawn(self, group: Tensor) -> Iterator[tuple[Tensor, Trajectories]]:
        """This replica's samples, some at a time: their places in the collection, and what was drawn.

        All forwards have one size, as the replicas must make equally many: the last ones draw some again. A pipeline is
        filled: as many of them are drawn side by side as it has ranks.
        """
        all_places = self._share.places().flatten()
        ranks, forwards = get_pipeline_model_parallel_world_size(), -(-len(all_places) // self.forward_size)
        size = self.forward_size * min(ranks, forwards)
        for places in all_places.split(size):
            phases.leave_step("collect")  # each has the whole time of a phase
            filled = torch.cat([places, places[-1:].expand(size - len(places))])
            position = self.place.position + filled
            plan = self._stage.plan(self._seed, position)
            row = filled % len(group)
            start = self.place.position + row if plan.same_start else position
            velocity = self._velocity(group, row, plan.guidance_scale)
            trajectories = draw(velocity, plan, self._seed, position, start, self._latent_shape)
            yield places, _first(trajectories, len(places))

    def _velocity(self, group: Tensor, row: Tensor, guidance_scale: float) -> Velocity:
        """At the prompts `row` [B] of the collection; a guidance-distilled model is told its scale by the engine."""
        prompts, empty = self._texts.of(group)
        asked, empty = (c.map(lambda tensor: tensor.to(device())) for c in (prompts.rows(row), empty))
        velocity = partial(self._engine.velocity, micro_batch_size=self.forward_size)
        return guided(*branches(velocity, asked, empty), guidance_scale)

    def _submit(self, places: Tensor, clean: Tensor, group: Tensor) -> None:
        if self.judge is not None:
            asked = group[places % len(group)].tolist()
            prompts = [self.prompts.prompts[i] for i in asked]
            self.judge.submit(places, clean, prompts, [self.prompts.metadata[i] for i in asked])

    def _replay(self) -> None:
        """Old log-probabilities as training computes them: in its forwards, which in bf16 makes a difference."""
        assert self._held is not None
        for update in range(self._share.updates):
            phases.leave_step("replay")
            batch = self._batch(0, update)
            measured = self._engine.measure(self._stage.points, self._stage.log_probability, batch)
            sample = self._samples_of_rows[self._stage.points(batch).sample]
            by_sample = measured.cpu()[sample.argsort(stable=True)]
            self._held.replace_log_probability(update, by_sample.view(self._share.count, -1))

    def _batch(self, number: int, update: int) -> Batch:
        """The batch of an update in a pass over the collection."""
        share = self._share
        assert self._held is not None, "collect first"
        source = order_of_pass(self._seed, self.place.position, share, number)[update]
        drawn, advantages = self._held.at(source)
        experience = self._stage.experience(drawn, advantages)
        rows = self._samples_of_rows = experience.sample
        group = self._order.of(self.place.collection)
        prompt = ((source * share.global_batch_size + share.columns()) % len(group))[rows]
        first = self.place.position + number * self.place.samples + update * share.global_batch_size
        self._rows = group[prompt]
        ranks = self.ranks
        batch = Batch(
            seed=self._seed,
            position=(first + share.columns())[rows],
            valid=~advantages.isnan()[rows],
            latent_shape=self._latent_shape,
            text_length=self.info.text_shape[0],
            collected=experience.collected,
            names=[self.prompts.prompts[i] for i in self._rows.tolist()],
        )
        if ranks.first_stage or ranks.last_stage:
            batch.latents = experience.latents.to(device())
        if ranks.first_stage:
            prompts, empty = self._texts.of(group)
            used, batch.prompt = prompt.unique(return_inverse=True)
            batch.text, batch.pooled = prompts.text[used].to(device()), prompts.pooled[used].to(device())
            batch.empty_text, batch.empty_pooled = empty.text[0].to(device()), empty.pooled[0].to(device())
        return batch


def _first(drawn: Trajectories, count: int) -> Trajectories:
    """Those of the first samples."""
    return Trajectories(**{name: value[:count] for name, value in vars(drawn).items()})
