"""soar-mega doctor"""

import argparse
import importlib.util
import os
import platform as system
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from soar_mega import layer_checks
from soar_mega.evaluation.scorers import SCORERS, SET_METRICS
from soar_mega.gpus import HOPPER, usable_memory
from soar_mega.gpus import MEMORY as GPU_MEMORY

if TYPE_CHECKING:
    from soar_mega.config import ParallelConfig

HELP = """\
Say what this machine can do: versions, devices, and which optional libraries are usable and why not.

  soar-mega doctor
  soar-mega doctor --weights DIR                                 which scorers of an evaluation can run, by their files
  soar-mega doctor --model sd35_large                            parameters, and their split over ranks
  soar-mega doctor --model recipes/tiny/base --tensor 2 --pipeline 2 --virtual-pipeline 2
  soar-mega doctor --model sd35_medium --gpu h100 --gpus 8       how many points fit in its memory (SOAR, 512 px)

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
        "--model", metavar="NAME", help="a preset (sd35_medium, sd35_large) or a pipeline folder"
    )
    parser.add_argument("--tensor", type=int, default=1, help="tensor parallel size (default: %(default)s)")
    parser.add_argument(
        "--pipeline", type=int, default=1, help="pipeline parallel size (default: %(default)s)"
    )
    parser.add_argument(
        "--virtual-pipeline",
        type=int,
        default=1,
        help="model chunks per pipeline rank (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu", choices=GPU_MEMORY, help="with --model: what fits in the memory of such a GPU"
    )
    parser.add_argument("--gpus", type=int, default=8, help="of the whole run (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=512, help="pixels (default: %(default)s)")
    parser.add_argument(
        "--text-length", type=int, default=154, help="tokens: 77 and those of T5 (default: %(default)s)"
    )
    parser.add_argument(
        "--global-batch-size", type=int, default=32, help="samples of a step (default: %(default)s)"
    )
    parser.add_argument(
        "--points", type=int, default=6, help="auxiliary points of a sample (default: %(default)s)"
    )
    parser.add_argument("--weights", default="", metavar="DIR", help="where the scorers' weights lie")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.model:
        from soar_mega.cli.process import start_process

        start_process()

        from soar_mega.config import ParallelConfig
        from soar_mega.models.common.summary import summarize

        parallel = ParallelConfig(
            tensor_model_parallel_size=arguments.tensor,
            pipeline_model_parallel_size=arguments.pipeline,
            virtual_pipeline_model_parallel_size=arguments.virtual_pipeline,
        )
        print(summarize(arguments.model, parallel))
        if arguments.gpu:
            print(f"\n{what_fits(arguments, parallel)}")
        return 0
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


def what_fits(arguments: argparse.Namespace, parallel: "ParallelConfig") -> str:
    """Sizes of micro-batches for a model on GPUs of a kind, as lines for a recipe."""
    from soar_mega.config import ModelConfig, Recipe, TrainConfig
    from soar_mega.models.common.micro_batches import recommend
    from soar_mega.models.family import find_sizes
    from soar_mega.stages import SoarConfig

    ranks = arguments.tensor * arguments.pipeline
    if arguments.gpus % ranks:
        raise ValueError(f"--gpus {arguments.gpus} must be a multiple of --tensor x --pipeline = {ranks}")
    recipe = Recipe(
        model=ModelConfig(preset=arguments.model),
        stage=SoarConfig(num_auxiliary_points=arguments.points),
        parallel=parallel,
        train=TrainConfig(global_batch_size=arguments.global_batch_size),
    )
    latent_size = (arguments.image_size // 8, arguments.image_size // 8)
    sizes = find_sizes(arguments.model)
    found = recommend(
        sizes,
        recipe,
        arguments.gpus // ranks,
        latent_size,
        arguments.text_length,
        usable_memory(arguments.gpu),
    )
    where = f"{arguments.gpus} {arguments.gpu} at {arguments.image_size} px and {arguments.text_length} text tokens"
    if found is None:
        return (
            f"{where}: one point does not fit even with recomputation; raise --tensor, --pipeline or --gpus"
        )
    advice = f"{where}, by the memory model:\n{found.words()}"
    if arguments.gpu in HOPPER and layer_checks.has_flash_3(sizes.attention_head_dim):
        advice += "\n  model.attention_backend=flash model.dtype=bf16: flash-attn 3, which is installed here"
    return advice


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
