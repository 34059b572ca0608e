"""A reward worker beside a link that trains: its address is in a file of the link's folder, and it ends with the link.

- name: flow_grpo
  train: recipes/sd35_medium/flow_grpo_ocr.yaml
  reward_worker: {serve: [ocr, --weights, models/scorers], slurm: {gpus_per_node: 1}}
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import yaml

from soar_mega.config import Recipe
from soar_mega.launch.slurm import Resources
from soar_mega.stages import CollectingConfig

FOLDER = "reward_worker"  # in the link's


@dataclass(frozen=True, kw_only=True)
class RewardWorker:
    """What `soar-mega serve-reward` is started with."""

    folder: Path
    names: list[str]
    options: list[str]
    resources: Resources

    @staticmethod
    def of(words: Sequence[str], folder: Path, resources: Resources) -> "RewardWorker":
        """From the names and options of a chain file. ValueError: there is no name."""
        names = list(takewhile(lambda word: not word.startswith("-"), words))
        if not names:
            raise ValueError("reward_worker: serve: name the rewards first, then options of serve-reward")
        options = list(words[len(names) :])
        return RewardWorker(folder=folder, names=names, options=options, resources=resources)

    @property
    def url_file(self) -> Path:
        return self.folder / "url"

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    def override(self, recipe: Recipe) -> str:
        """The setting by which the run of a recipe asks the worker for what it serves.

        ValueError: the recipe's stage is judged by nobody, or not by all that is served.
        """
        if not isinstance(recipe.stage, CollectingConfig):
            raise ValueError(
                f"reward_worker: stage.name={recipe.stage.name} draws no samples that could be judged"
            )
        rewards = recipe.stage.rewards
        if unknown := [name for name in self.names if name not in rewards]:
            raise ValueError(
                f"reward_worker serves {unknown[0]}, which stage.rewards does not name: it has {', '.join(rewards)}"
            )
        asked = {
            f"file:{self.url_file}#{key}" if key in self.names else key: weight
            for key, weight in rewards.items()
        }
        return f"stage.rewards={yaml.safe_dump(asked, default_flow_style=True, width=math.inf).strip()}"

    def arguments(self, on_network: bool) -> list[str]:
        """Of the soar-mega command: what the chain file says wins, but for where the address is written."""
        words = ["serve-reward", *self.names, "--port", "0"]
        if on_network:
            words += ["--host", "0.0.0.0", "--token-file", str(self.token_file)]
        return [*words, *self.options, "--url-file", str(self.url_file)]
