"""What a run that draws its own samples needs before its model is there: prompts, their embeddings, and a judge.

The text encoders run here, once for a set of prompts, and are gone when the model comes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from soar_mega.config import Recipe
from soar_mega.data.encoder_facts import encoder_facts
from soar_mega.data.info import bucket_name
from soar_mega.data.prompt_cache import PromptCache, cache_name
from soar_mega.data.prompt_files import PromptSet, read_prompts
from soar_mega.data.ranks import agree, this_rank
from soar_mega.data.shards import spread
from soar_mega.distributed import device
from soar_mega.faults.agreement import on_rank_zero
from soar_mega.models.common.build import DTYPES
from soar_mega.rewards import Rewards, make_rewards
from soar_mega.stages import CollectingConfig
from soar_mega.training.collector import Collector
from soar_mega.training.judge_queue import Judge
from soar_mega.training.prompt_texts import PromptTexts

CACHE = "prompts"  # in the run folder


def make_collector(recipe: Recipe) -> Collector:
    """The samples of a run, from its first on. Collective over the world.

    Raises:
        DataError: on all ranks alike: prompts, encoders or rewards are not what they should be.
    """
    pipeline, data, dtype = Path(recipe.model.pipeline_dir), recipe.data, DTYPES[recipe.model.dtype]
    failure = None
    try:
        facts = encoder_facts(pipeline, data.max_sequence_length)
        size = facts.image_size(data.resolution)
        facts.latent_shape(*size)
        prompts = read_prompts(data.prompts)
        held_out = held_out_prompts(recipe)
        judge = _judge(recipe, [prompts] if held_out is None else [prompts, held_out])
    except (ValueError, OSError) as error:
        failure = str(error)
    agree({}, 0, failure)
    # no shards whose encoders could be others
    info = facts.dataset_info({bucket_name(*size): len(prompts)}, dtype, encoders={})
    first_stage = this_rank().first_stage

    def texts(of: PromptSet) -> PromptTexts:
        return PromptTexts(_filled_cache(recipe, of), info, first_stage)

    validation = None if held_out is None else (held_out, texts(held_out))
    return Collector(recipe, info, prompts, texts(prompts), judge, size, validation)


def held_out_prompts(recipe: Recipe) -> PromptSet | None:
    """The held-out prompts that are measured."""
    if not (recipe.data.validation_prompts and recipe.logging.eval_interval):
        return None
    found = read_prompts(recipe.data.validation_prompts, "test")
    # of all of its kinds: the files of GenEval have one after the other
    chosen = spread(range(len(found)), recipe.logging.eval_samples)
    return replace(
        found,
        prompts=[found.prompts[i] for i in chosen],
        metadata=[found.metadata[i] for i in chosen],
        places=[found.places[i] for i in chosen],
    )


def _judge(recipe: Recipe, prompt_sets: Sequence[PromptSet]) -> Judge | None:
    """On one rank of each replica; None on the others. ValueError where a reward cannot judge one of the prompts."""
    assert isinstance(recipe.stage, CollectingConfig)
    ranks = this_rank()
    if not (ranks.leader and ranks.first_stage):
        return None
    from soar_mega.data.vae import Decoder  # brings diffusers, which most ranks do not need

    rewards = make_rewards(recipe.stage.rewards, recipe.stage.scorer_weights_dir, device())
    for each in prompt_sets:
        _check_prompts(rewards, each)
    return Judge(Decoder.load(Path(recipe.model.pipeline_dir)), rewards)


def _check_prompts(rewards: Rewards, prompts: PromptSet) -> None:
    """ValueError where a reward says beforehand that it cannot judge a prompt; names file and line."""
    for prompt, metadata, lines in zip(prompts.prompts, prompts.metadata, prompts.places, strict=True):
        try:
            rewards.check(prompt, metadata)
        except ValueError as error:
            raise ValueError(f"{prompts.path}:{lines[0]}: {error}") from error


def _filled_cache(recipe: Recipe, prompts: PromptSet) -> PromptCache:
    """The prompts' embeddings, made by rank 0 where they are not there."""
    pipeline, data, dtype = recipe.model.pipeline_dir, recipe.data, DTYPES[recipe.model.dtype]
    parent = data.prompt_cache or str(Path(recipe.checkpoint.save, CACHE))

    def fill() -> str:
        name = cache_name(pipeline, prompts.prompts, dtype, data.max_sequence_length)
        made = PromptCache(parent, name, len(prompts))
        made.fill(pipeline, prompts.prompts, dtype, data.max_sequence_length)
        return name

    return PromptCache(parent, on_rank_zero(fill), len(prompts))
