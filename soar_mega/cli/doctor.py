"""soar-mega doctor"""

import argparse
import importlib.util
import os
import platform as system
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from soar_mega import layer_checks
from soar_mega.cli.overrides import take_overrides
from soar_mega.evaluation.scorers import SCORERS, SET_METRICS
from soar_mega.gpus import MEMORY

HELP = """\
Say what this machine can do: versions, devices, and which optional libraries are usable and why not.

  soar-mega doctor
  soar-mega doctor --weights DIR                                 which scorers of an evaluation can run, by their files
  soar-mega doctor --model sd35_large                            parameters, and their split over ranks
  soar-mega doctor --model recipes/tiny/base --tensor 2 --pipeline 2 --virtual-pipeline 2
  soar-mega doctor --model sd35_medium --gpu h100 --gpus 8       how many points fit in its memory (SOAR, 512 px)
  soar-mega doctor --recipe recipes/sd35_large/soar.yaml --model sd35_large --gpu h100 --gpus 8
                                                                 what a recipe takes as it is, and what is best for it

Exits with 1 when something that every run needs is missing.
"""

REQUIRED = (
    "torch",
    "megatron-core",
    "deepspeed",
    "psutil",
    "diffusers",
    "transformers",
    "safetensors",
    "webdataset",
    "tensorboard",
)
# library: module, what it is for, whether it is useless without a GPU
OPTIONAL = {
    "transformer-engine": (
        "transformer_engine.pytorch",
        "model.transformer_impl=transformer_engine, model.fp8",
        True,
    ),
    "flash-attn": ("flash_attn", "model.attention_backend=flash", True),
    "flash-attn-3": (layer_checks.FLASH_3_OPERATORS, "model.attention_backend=flash on Hopper", True),
    "triton": ("triton", "fused kernels (without it their eager twins run)", True),
}


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "doctor",
        help="say what this machine, or a model on it, needs",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a preset (sd35_medium, sd35_large, flux_dev, flux_schnell) or a pipeline folder",
    )
    parser.add_argument(
        "--recipe", metavar="FILE", help="what this recipe takes, with --model in the place of its own model"
    )
    take_overrides(parser)
    parser.add_argument("--gpu", type=str.lower, choices=MEMORY, help="what fits in the memory of such a GPU")
    parser.add_argument("--gpus", type=int, default=8, help="of the whole run (default: %(default)s)")
    parser.add_argument(
        "--image-size", type=int, help="pixels (default: 512, or the most that the model takes)"
    )
    parser.add_argument(
        "--text-length", type=int, help="tokens: of SD3.5 77 and those of T5 (default: 154, of FLUX 512)"
    )
    of_recipe = parser.add_argument_group("without --recipe, SOAR")
    of_recipe.add_argument("--tensor", type=int, help="tensor parallel size (default: 1)")
    of_recipe.add_argument("--pipeline", type=int, help="pipeline parallel size (default: 1)")
    of_recipe.add_argument("--virtual-pipeline", type=int, help="model chunks per pipeline rank (default: 1)")
    of_recipe.add_argument("--global-batch-size", type=int, help="samples of a step (default: 32)")
    of_recipe.add_argument("--points", type=int, help="auxiliary points of a sample (default: 6)")
    parser.add_argument("--weights", default="", metavar="DIR", help="where the scorers' weights lie")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.model or arguments.recipe:
        from soar_mega.cli.process import start_process

        start_process()

        from soar_mega.cli.fitting import describe

        print(describe(arguments))
        return 0
    if arguments.gpu:
        raise ValueError(f"--gpu {arguments.gpu}: what is to fit in it? Name --model or --recipe")
    healthy = True
    print(f"Python {system.python_version()} on {system.platform()}")
    print("\nrequired")
    for name in REQUIRED:
        version = installed(name)
        healthy = healthy and version is not None
        print(f"  {name:<20} {version or 'MISSING: install soar_mega again, or this package alone'}")
    if not healthy:
        return 1
    print("\ndevices")
    for line in devices():
        print(f"  {line}")
    print("\noptional")
    for name in OPTIONAL:
        usable, words = examine(name)
        print(f"  {name:<20} {'usable' if usable else 'not usable'}: {words}")
    print("\nscorers")
    for line in scorers(arguments.weights):
        print(f"  {line}")
    clash = unusable_pair(installed("triton"), installed("numpy"))
    if clash:
        print(f"\n{clash}")
    return 0


def scorers(weights_dir: str) -> Iterator[str]:
    """Whether each scorer of an evaluation can run, and what it lacks."""
    needs: dict[str, list[str]] = {"digits": []}
    if importlib.util.find_spec("sklearn") is None:
        needs["digits"].append("the package scikit-learn (pip install 'soar_mega[digits]')")
    for name, entry in (SCORERS | SET_METRICS).items():
        needs[name] = entry.lacks(Path(weights_dir) if weights_dir else None)
        if entry.files and not weights_dir:
            needs[name].append("weights (--weights DIR looks for them)")
    for name, lacks in needs.items():
        yield f"{name:<20} {'usable' if not lacks else 'not usable: lacks ' + ', '.join(lacks)}"


def unusable_pair(triton: str | None, numpy: str | None) -> str | None:
    """What is wrong with these versions together, if anything."""
    from packaging.version import Version

    if not triton or not numpy or Version(triton) >= Version("3.7") or Version(numpy) < Version("2.4"):
        return None
    return (
        f"triton {triton} cannot interpret kernels with NumPy {numpy}, which the tests do without a GPU: install "
        "numpy<2.4, or a torch that comes with triton 3.7 or newer"
    )


def installed(name: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[str]:
    """What torch can compute on, and what communicates between processes."""
    import torch
    import torch.distributed

    from soar_mega.layer_checks import fp8_recipes

    if not torch.cuda.is_available():
        reason = (
            "this torch is a CPU build"
            if torch.version.cuda is None
            else "torch sees no GPU: look at nvidia-smi"
        )
        yield f"no GPU ({reason}): runs use the CPU and gloo"
        yield f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads per process"
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        recipes = fp8_recipes((gpu.major, gpu.minor))
        fp8 = f", model.fp8_recipe={' | '.join(recipes)}" if recipes else ""
        features = f"bf16{fp8}" if gpu.major >= 8 else "no bf16"
        yield f"GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor} ({features})"
    nccl = (
        ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "MISSING"
    )
    yield f"CUDA {torch.version.cuda}, NCCL {nccl}"
    yield cores(cores_per_process(torch.cuda.device_count()))


def cores_per_process(processes: int) -> int:
    """The cores of each process here: as many processes as torchrun has started, or as given."""
    mine = len(os.sched_getaffinity(0))
    if "SLURM_CPUS_PER_TASK" in os.environ:  # the job has said how many a process has
        return min(mine, int(os.environ["SLURM_CPUS_PER_TASK"]))
    return mine // int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def cores(count: int) -> str:
    """For how many reader processes the cores of a process with a GPU are enough."""
    from soar_mega.launch.slurm import cpus_wanted

    needed = cpus_wanted(0)
    if count < needed:
        return (
            f"CPU: {count} cores per process, which is TOO FEW: a rank keeps {needed} busy, and one more for each of "
            "data.num_workers; give jobs more (--cpus-per-task), or run fewer processes"
        )
    return f"CPU: {count} cores per process, enough for data.num_workers={count - needed}"


def examine(name: str) -> tuple[bool, str]:
    """Whether an optional library is usable, and its version and use, or the reason."""
    import torch

    module, purpose, needs_gpu = OPTIONAL[name]
    version = installed(name)
    if version is None:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return False, f"not installed; for {purpose}"
        version = "of an unknown version"  # put on the path by hand
    try:
        importlib.import_module(module)
    except Exception as error:  # a library built for another torch fails in any way it likes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return False, f"{version} is installed but does not load ({reason})"
    if needs_gpu and not torch.cuda.is_available():
        return False, f"{version} is installed, but there is no GPU"
    return True, f"{version}; for {purpose}"
