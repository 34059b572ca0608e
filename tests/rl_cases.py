"""Short runs that draw their own samples, and rewards that are known functions of an image."""

import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import ROOT
from torch import Tensor

from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import Recipe
from soar_mega.distributed import start_world, stop_world
from soar_mega.stages import load_recipe
from soar_mega.training.loop import Steps, make_loader

PROMPTS = [
    "a red 3",
    "two 4s",
    "an 8",
    "a 1 above a 2",
    'the number "12"',
    "a blue 7",
    "a 5 and a 6",
    "a white 0",
]
STAGES = ("flow_grpo", "diffusion_nft")


def mean_red(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """How red an image [N, 3, H, W] is."""
    return images[:, 0].flatten(1).mean(dim=1)


def rl_words(folder: Path, **overrides: Any) -> list[str]:
    """The overrides of a short run: collections of 4 prompts x 4 images, which are learned from twice in 2 updates."""
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        prompts.write_text("".join(prompt + "\n" for prompt in PROMPTS))
    settings = {
        "model.pipeline_dir": ROOT / "recipes" / "tiny" / "base",
        "stage.rewards": "{'rl_cases:mean_red': 1.0}",
        "stage.images_per_prompt": 4,
        "stage.prompts_per_collection": 4,
        "stage.updates_per_sample": 2,
        "stage.collect_micro_batch_size": 3,
        "stage.sampling_steps": 3,
        "data.prompts": prompts,
        "data.prompt_cache": folder / "cache",
        "checkpoint.save": folder / "run",
        "checkpoint.export": "false",
        "checkpoint.save_interval": 1000,
        "train.train_iters": 6,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 4,
        "train.points_per_micro_batch": 3,
        "optimizer.lr": 3e-4,
        "logging.log_interval": 1,
        "logging.tensorboard": "false",
        "logging.collection_interval": 0,
    }
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    return [f"{key}={value}" for key, value in settings.items()]


class OwnReward:
    """A reward in a file of the test's own, which processes of the test find; it is out of order at first."""

    key = "own_reward:red"

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file = folder / "own_reward.py"
        self._file.write_text("raise ImportError('out of order')")
        monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def mend(self) -> None:
        self._file.write_text(
            "def red(images, prompts, metadata):\n    return images[:, 0].mean(dim=(1, 2))\n"
        )

    def words_of_link(self, folder: Path) -> list[str]:
        """The overrides of a chain's link that is judged by it."""
        judged = {"stage.rewards": f"{{'{self.key}': 1.0}}", "checkpoint.export": "true"}
        own = ("checkpoint.save=", "model.pipeline_dir=")  # the chain's
        return [word for word in rl_words(folder, **judged) if not word.startswith(own)]


def rl_recipe(folder: Path, stage: str, **overrides: Any) -> Recipe:
    """The recipe of such a run, in folder/run; prompts and their embeddings lie beside it."""
    if stage == "diffusion_nft":
        overrides = {"stage__num_levels": 2} | overrides
    return load_recipe(ROOT / "recipes" / "tiny" / f"{stage}.yaml", rl_words(folder, **overrides))


@contextmanager
def rl_steps(recipe: Recipe) -> Any:
    """The run, started or resumed in this process."""
    start_world(recipe.parallel)
    run = Steps(recipe, RunFolder(recipe.checkpoint.save), make_loader(recipe))
    try:
        yield run
    finally:
        run.close()


def behaviour(recipes: list[Recipe], iterations: int) -> list[dict[str, Any]]:
    """What runs do in their first steps, one after the other at one layout: the same on every rank."""
    found = []
    for recipe in recipes:
        with rl_steps(recipe) as run:
            found.append(taken(run, iterations))
    stop_world()
    return found


def taken(run: Steps, iterations: int) -> dict[str, Any]:
    """Rewards, advantages, losses and gradient norms of some steps."""
    rewards, advantages, losses, norms = [], [], [], []
    for _ in range(iterations):
        collection = run.collect()
        if collection is not None:
            rewards.append(collection.rewards["mean_red"])
            advantages.append(collection.advantages)
        losses.append(run.learn()["loss"])
        result = run.update()
        assert result.ok
        norms.append(result.grad_norm)
    return {
        "rewards": torch.stack(rewards),
        "advantages": torch.stack(advantages),
        "losses": torch.tensor(losses),
        "norms": torch.tensor(norms),
    }
