"""Which layout for a model on a number of GPUs: memory and step time of every one, predicted by a stated model.

    python tools/plan_layout.py --model sd35_large --gpus 64 --gpu h100
    python tools/plan_layout.py --check           the model against what was measured on one H100
    python tools/plan_layout.py --validate        its order of layouts against four gloo processes on this machine

Memory is soar_mega/models/common/memory.py, floating point operations are soar_mega/models/common/flops.py, everything
that a machine can do is tools/plan/hardware.py, each number with its source. Nothing but one GPU was ever measured:
what is said of several is a prediction.
"""

import argparse
from collections import Counter

from arguments import number, positive, result_file
from plan.hardware import HARDWARE
from plan.search import Case, Plan, search

from soar_mega.cli.process import start_process
from soar_mega.config import ModelConfig, Recipe, TrainConfig
from soar_mega.models.common.sizes import PIXELS, image_side
from soar_mega.models.family import find_sizes
from soar_mega.rules import at_least, from_below
from soar_mega.stages import SoarConfig

SHOWN = 10
SAMPLES = 4  # of a step for each GPU, where nothing else is asked for
NOT_MODELLED = (
    "not in the model: FP8, flash-attn 3, Transformer Engine, LoRA, offloading, reading data, stragglers"
)


def make_case(args: argparse.Namespace, gpus: int | None = None, batch: int | None = None) -> Case:
    """What the command line asks for."""
    gpus = gpus or args.gpus
    recipe = Recipe(
        model=ModelConfig(preset=args.model),
        stage=SoarConfig(num_auxiliary_points=args.points),
        train=TrainConfig(
            global_batch_size=batch or args.global_batch_size or SAMPLES * gpus, ema_decay=args.ema_decay
        ),
    )
    sizes = find_sizes(args.model)
    side = image_side(sizes, args.image_size) // PIXELS
    text_length = args.text_length or sizes.family.text_tokens
    return Case(sizes, recipe, gpus, HARDWARE[args.gpu], (side, side), text_length, args.gpus_per_node)


def name(plan: Plan) -> str:
    """The layout in a few words."""
    parallel = plan.recipe.parallel
    words = [f"TP{parallel.tensor_model_parallel_size}", f"PP{parallel.pipeline_model_parallel_size}"]
    if parallel.virtual_pipeline_model_parallel_size:
        words.append(f"VPP{parallel.virtual_pipeline_model_parallel_size}")
    if parallel.context_parallel_size > 1:
        words.append(f"CP{parallel.context_parallel_size}")
    words.append(f"DP{plan.data_size}")
    if parallel.engine == "deepspeed":
        words.append(f"ZeRO{parallel.zero_stage}")
    model = plan.recipe.model
    if model.recompute_granularity == "selective":
        words.append("recompute light")
    if model.recompute_granularity == "full":
        words.append("recompute" + (f"/{model.recompute_every}" if model.recompute_every > 1 else ""))
    return " ".join(words)


def table(plans: list[Plan]) -> str:
    """The fastest layouts, one a line."""
    lines = [
        f"{'samples/s':>10} {'step s':>8} {'GiB':>6} {'points':>7} {'answers':>7} {'bubble':>7} {'reduce':>7}  layout"
    ]
    for plan in plans:
        time = plan.time
        shares = " ".join(f"{part / time.total:7.1%}" for part in (time.answers, time.bubble, time.reduction))
        lines.append(
            f"{plan.samples_per_second:10.2f} {time.total:8.3f} {plan.memory.total / 2**30:6.1f} "
            f"{plan.recipe.train.points_per_micro_batch:7d} {shares}  {name(plan)}"
        )
    return "\n".join(lines)


ALWAYS_SAID = (
    "engine",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "overlap_rollout",
)
WORDS = {True: "true", False: "false", None: "null"}


def recipe_lines(plan: Plan) -> str:
    """The groups of a recipe that hold the layout, with all that another layout in the recipe would leave behind."""
    parallel, train, model = plan.recipe.parallel, plan.recipe.train, plan.recipe.model
    only_of_zero = "zero_stage" if parallel.engine == "deepspeed" else None
    groups: dict[str, dict[str, object]] = {
        "model": {
            "recompute_granularity": model.recompute_granularity,
            "recompute_every": model.recompute_every,
            "recompute_modules": f"[{', '.join(model.recompute_modules)}]",
        },
        "parallel": {
            key: value
            for key, value in vars(parallel).items()
            if value != getattr(type(parallel)(), key) or key in ALWAYS_SAID or key == only_of_zero
        },
        "train": {
            key: getattr(train, key)
            for key in ("global_batch_size", "micro_batch_size", "points_per_micro_batch")
        },
    }
    return "\n".join(
        line
        for group, settings in groups.items()
        for line in [
            f"{group}:",
            *(f"  {k}: {WORDS[v] if v is None or isinstance(v, bool) else v}" for k, v in settings.items()),
        ]
    )


def report(case: Case, plans: list[Plan], refused: Counter[str]) -> str:
    """All that a person reads."""
    batch = case.recipe.train.global_batch_size
    head = (
        f"Predicted, not measured: {case.gpus} GPUs ({case.hardware.memory}), {batch} samples a step, "
        f"{case.tokens.image} image and {case.tokens.text} text tokens"
    )
    best = best_of_each_layout(plans)[:SHOWN]
    lines = [head, NOT_MODELLED, "", table(best) if best else "nothing fits"]
    lines += ["", f"{len(plans):,} settings fit; of the rest"]
    lines += [f"  {count:,}: {reason}" for reason, count in refused.most_common()]
    if best:
        lines += ["", f"of the first, for a recipe ({best[0].memory.words()}):", "", recipe_lines(best[0])]
    return "\n".join(lines)


def best_of_each_layout(plans: list[Plan]) -> list[Plan]:
    """Of plans, fastest first, the first of each layout."""
    found: dict[str, Plan] = {}
    for plan in plans:
        found.setdefault(name(plan), plan)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="sd35_medium", help="a preset or a pipeline folder (default: %(default)s)"
    )
    parser.add_argument("--gpus", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--gpu", choices=HARDWARE, default="h100", help="default: %(default)s")
    parser.add_argument(
        "--gpus-per-node", type=positive, default=8, help="that share the fast link (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size", type=positive, help="pixels (default: 512, or the most that the model takes)"
    )
    parser.add_argument("--text-length", type=positive, help="tokens (default: 154, of FLUX 512)")
    parser.add_argument(
        "--points",
        type=number(int, at_least(0)),
        default=6,
        help="auxiliary points; 0: SFT (default: %(default)s)",
    )
    parser.add_argument(
        "--global-batch-size", type=positive, help=f"samples of a step (default: {SAMPLES} for each GPU)"
    )
    parser.add_argument(
        "--ema-decay", type=number(float, from_below(0, 1)), default=0.0, help="0: no EMA (default)"
    )
    parser.add_argument("--check", action="store_true", help="compare with the measured rows on one H100")
    parser.add_argument(
        "--validate", metavar="FILE", nargs="?", const="", help="compare with four gloo processes"
    )
    args = parser.parse_args()
    start_process()
    if args.check:
        from plan.check import check

        print(check())
    elif args.validate is not None:
        from plan.validate import validate

        validate(result_file(args.validate, "", "--validate") if args.validate else None)
    else:
        try:
            case = make_case(args)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        print(report(case, *search(case)))


if __name__ == "__main__":
    main()
