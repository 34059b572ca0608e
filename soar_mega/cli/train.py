"""soar-mega train"""

import argparse
import os
from typing import TYPE_CHECKING

from soar_mega.cli.overrides import take_overrides

if TYPE_CHECKING:
    from soar_mega.config import Recipe

HELP = """\
Post-train a model as a recipe says, in one process or under torchrun:

  soar-mega train recipes/tiny/soar.yaml
  soar-mega train recipes/tiny/soar.yaml stage.num_auxiliary_points=4 train.train_iters=100
  soar-mega train recipes/tiny/soar.yaml stage.num_auxiliary_points=4 --show       all settings, and no run
  torchrun --nproc-per-node 4 -m soar_mega train recipes/tiny/soar.yaml \\
      parallel.tensor_model_parallel_size=2 parallel.pipeline_model_parallel_size=2

Overrides are group.key=value, read as YAML: optimizer.frozen=[context_embedder*] stage.shift=null. The groups are
model, stage, parallel, train, optimizer, lora, data, checkpoint and logging; docs/settings.md says what each of their
settings does. stage.name says which others the group stage has.

The run folder is checkpoint.save. It receives run_config.yaml (every value that was used), iter_0000500/ checkpoints,
tensorboard/, and at the end export/, a diffusers pipeline folder. The same command resumes an interrupted run.

failures/ says why a run ended that could not go on, anomalies.jsonl which steps had a loss far above the others, and
--replay-step computes such a step again (docs/operations.md).

Exit codes: 0 the run is complete; 75 it was saved and stopped early (a signal, or train.exit_duration_in_mins): start
it again; 1 an error, which the message explains (SOAR_MEGA_TRACEBACK=1 shows where).
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "train",
        help="post-train a model as a recipe says",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML recipe, for example recipes/tiny/soar.yaml")
    take_overrides(parser)
    parser.add_argument(
        "--show",
        action="store_true",
        help="print all settings, as the run's run_config.yaml would hold them, and start nothing",
    )
    parser.add_argument(
        "--replay-step",
        type=int,
        metavar="N",
        help="compute step N of the run again, from its newest checkpoint before N, and print the loss of every "
        "sample and the gradient norms; the run folder is only read",
    )
    parser.add_argument(
        "--scale-down",
        action="store_true",
        help="try the recipe: its stage, layout, layers and heads, but narrow, four steps on noise or on samples "
        "that a stand-in judges, in the folder <checkpoint.save>_scaled_down",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from soar_mega.stages import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    # as torchrun says it; the world starts later
    is_first = os.environ.get("RANK", "0") == "0"
    if arguments.show:
        from soar_mega.recipe import recipe_to_yaml

        shown = scaled_down(recipe, writes=False) if arguments.scale_down else recipe
        if is_first:
            print(recipe_to_yaml(shown), end="")
        return 0

    from soar_mega.cli.process import start_process

    start_process()

    if arguments.scale_down:
        recipe = scaled_down(recipe, writes=is_first)

    if arguments.replay_step is not None:
        from soar_mega.training.replay import as_text, replay

        replayed = replay(recipe, arguments.replay_step)
        if replayed is not None:
            print(as_text(replayed))
        return 0

    from soar_mega.training.run import train

    return train(recipe)


def scaled_down(recipe: "Recipe", writes: bool) -> "Recipe":
    """The recipe to try this one with, in as many processes as torchrun has started."""
    from soar_mega.training.scale_down import scale_down

    return scale_down(recipe, int(os.environ.get("WORLD_SIZE", "1")), writes)
