"""How much training is behind some weights: steps, samples and floating point operations of each run of their line."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soar_mega.checkpoints.lineage import FILE as LINEAGE
from soar_mega.checkpoints.lineage import read_lineage
from soar_mega.checkpoints.resume import read_description
from soar_mega.checkpoints.run_folder import DESCRIPTION, RECIPE, RunFolder
from soar_mega.config import Recipe
from soar_mega.data.encoder_facts import encoder_facts
from soar_mega.data.remote import read_info
from soar_mega.models.common.flops import Tokens, forward_work, image_tokens, step_work
from soar_mega.models.common.rank_parameters import trained_shares
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.family import model_sizes
from soar_mega.stages import load_recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run, as far as it matters for the weights.

    Attributes:
        iterations, samples: its own, without those of the run that it goes on from (checkpoint.load).
        flops: forwards and backwards that the method asks for, at the size that most samples have; None where the
            recipe or the data set is not there any more.
    """

    run: str
    stage: str
    iterations: int
    samples: int
    flops: float | None


def history(weights: str | Path) -> list[dict[str, Any]]:
    """The runs behind a checkpoint, an export or adapters, the youngest first; empty where nothing was recorded.

    A run whose folder is gone ends the line.
    """
    found: list[Training] = []
    folder: Path | None = Path(weights)
    while folder is not None:
        run = _run_of(folder)
        if run is None or any(known.run == str(run) for known in found):
            break
        lineage = read_lineage(run / LINEAGE)
        parent = None if lineage["parent"] is None else Path(lineage["parent"]["path"])
        goes_on = lineage["starts"][0].get("iteration", 0) > 0
        found.append(_training(run, folder, parent if goes_on else None))
        folder = parent
    return [asdict(each) for each in found]


def _run_of(weights: Path) -> Path | None:
    """The folder of the run that wrote weights; None where there is none."""
    return next((above for above in (weights, *weights.parents[:2]) if (above / LINEAGE).is_file()), None)


def _training(run: Path, weights: Path, goes_on_from: Path | None) -> Training:
    """goes_on_from: the checkpoint whose iterations the run counts on from."""
    iterations, samples = _progress(run, weights)
    if goes_on_from is not None and (before := _run_of(goes_on_from)) is not None:
        done = _progress(before, goes_on_from)
        iterations, samples = iterations - done[0], samples - done[1]
    stage, flops = "", None
    try:
        recipe = load_recipe(run / RECIPE)
        stage = recipe.stage.name
        flops = samples * _work_of_sample(recipe)
    except (ValueError, OSError) as error:
        log.info("the work of %s cannot be counted: %s", run, error)
    return Training(run=str(run), stage=stage, iterations=iterations, samples=samples, flops=flops)


def _progress(run: Path, weights: Path) -> tuple[int, int]:
    """Iterations and samples of a checkpoint, or of the end of the run that exported the weights."""
    if (weights / DESCRIPTION).is_file():
        said: dict[str, Any] = read_description(weights)
    else:
        said = RunFolder(run).complete() or {}
    return said.get("iteration", 0), said.get("consumed_samples", 0)


def _work_of_sample(recipe: Recipe) -> float:
    """Floating point operations of learning from one sample, drawing it included where the method draws."""
    sizes = model_sizes(recipe.model)
    stage = recipe.stage.asking(sizes.guidance_embeds)
    forward = forward_work(sizes, _tokens(recipe, sizes))
    forwards = stage.forwards()
    work = step_work(forward, forwards.answers, forwards.points, trained_shares(sizes, recipe))
    return work.total + stage.drawing_forwards * forward.total


def _tokens(recipe: Recipe, sizes: Sizes) -> Tokens:
    """Of a sample of the size that most have."""
    if recipe.data.path:
        info = read_info(recipe.data.path)
        return Tokens(image_tokens(sizes, info.latent_shape(info.largest_bucket)[1:]), info.text_shape[0])
    facts = encoder_facts(Path(recipe.model.pipeline_dir), recipe.data.max_sequence_length)
    latents = facts.latent_shape(*facts.image_size(recipe.data.resolution))
    return Tokens(image_tokens(sizes, latents[1:]), facts.text_shape[0])
