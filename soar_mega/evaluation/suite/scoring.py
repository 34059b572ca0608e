"""The scorers of a suite by their names: published metrics, and whatever else serves as a reward."""

from collections.abc import Iterable, Mapping

import torch

from soar_mega.evaluation.scorer import Particular, Scorer
from soar_mega.evaluation.scorers import SCORERS
from soar_mega.evaluation.scorers import make_scorer as make_published
from soar_mega.evaluation.suite.prompts import PromptSet
from soar_mega.rewards import make_scorer


def make_scorers(names: Iterable[str], weights_dir: str, device: torch.device) -> dict[str, Scorer]:
    """All scorers, each once, ready to judge.

    Args:
        names: of evaluation/scorers, of rewards, or module:function.
        weights_dir: where those of evaluation/scorers find their files.

    Raises:
        ValueError: one is not known, or lacks a file or a package; names it.
    """
    scorers: dict[str, Scorer] = {}
    for name in dict.fromkeys(names):
        scorers[name] = make_published(name, weights_dir, device) if name in SCORERS else make_scorer(name)
    return scorers


def check_prompts(prompt_sets: Iterable[PromptSet], scorers: Mapping[str, Scorer]) -> None:
    """ValueError where a prompt cannot be judged by a scorer of its set; names file and line."""
    for each in prompt_sets:
        for scorer in map(scorers.__getitem__, each.settings.scorers):
            if not isinstance(scorer, Particular):
                continue
            for item in each.items:
                try:
                    scorer.check(item.prompt, item.metadata)
                except ValueError as error:
                    raise ValueError(f"{each.path}:{item.line}: {error}") from error
