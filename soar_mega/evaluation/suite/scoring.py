"""The scorers of a suite by their names: published metrics, and whatever else serves as a reward."""

from collections.abc import Iterable, Mapping

import torch

from soar_mega.evaluation.scorer import Particular, Scorer
from soar_mega.evaluation.suite.prompt_sets import PromptSet
from soar_mega.rewards.registry import make_scorers as make_named


def make_scorers(names: Iterable[str], weights_dir: str, device: torch.device) -> dict[str, Scorer]:
    """All scorers, each once, ready to judge.

    Args:
        names: of evaluation/scorers, of rewards, or module:function.
        weights_dir: where those of evaluation/scorers find their files.

    Raises:
        ValueError: one is not known, has the name of another, or lacks a file or a package; names it.
    """
    keys = list(dict.fromkeys(names))
    return dict(zip(keys, make_named(keys, weights_dir, device), strict=True))


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
