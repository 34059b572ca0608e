"""soar-mega sample"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from soar_mega.cli.adapted import split_adapted
from soar_mega.cli.numbers import check_at_least_one, check_guidance_scales

if TYPE_CHECKING:
    from soar_mega.data.prompts import EncodedPrompts
    from soar_mega.evaluation.generate import Generator

HELP = """\
Draw images with a diffusers pipeline folder, or with a checkpoint of a run: the pipeline's encoders, the transformer
in our implementation, our sampler.

  soar-mega sample recipes/tiny/base --prompt "a red 3" --guidance-scale 3 --out three.png
  soar-mega sample recipes/tiny/base+runs/x/export_lora --prompt "a red 3" --guidance-scale 3
  soar-mega sample runs/x/export --prompts prompts.txt --count 4 --steps 40 --out grid.png
  torchrun --nproc-per-node 4 -m soar_mega sample runs/x --ema --prompt "a red 3" \\
      --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

PIPELINE+ADAPTERS puts adapters (LoRA) on the transformer, in PEFT's or in diffusers' format.

Each prompt is a row of the picture, with --count images that start from different noise. The same seed gives the same
picture at any batch size and layout. Guidance scale 1 is sampling without classifier-free guidance; a negative prompt
is what guidance leads away from, in the place of the empty one. A checkpoint is drawn with at any layout, whatever it
was trained at; its encoders are those of the pipeline that the run started from.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "sample",
        help="draw images with a pipeline folder or a checkpoint",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE[+ADAPTERS]",
        help="diffusers pipeline folder, for example export/ of a run; or a run or iter_ folder",
    )
    parser.add_argument("--pipeline-dir", help="of a checkpoint: take the encoders from this pipeline folder")
    parser.add_argument("--ema", action="store_true", help="the EMA weights of a checkpoint")
    for name in ("tensor", "pipeline"):
        parser.add_argument(
            f"--{name}-model-parallel-size",
            type=int,
            default=1,
            help="of a checkpoint (default: %(default)s)",
        )
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; give it again for more rows")
    parser.add_argument("--negative-prompt", default="", help="of all prompts (default: the empty one)")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt per line")
    parser.add_argument(
        "--out", default="grid.png", help="the picture to write: png, jpg or webp (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=1, help="images per prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="sampler steps (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=4.5, help="(default: %(default)s)")
    parser.add_argument(
        "--solver", choices=("euler", "heun", "dpm++2m"), default="euler", help="(default: %(default)s)"
    )
    parser.add_argument("--shift", type=float, help="timestep shift (default: the pipeline's scheduler's)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--size",
        metavar="WxH",
        help="pixels (default: the transformer's own, of FLUX that of an export's training)",
    )
    parser.add_argument(
        "--scale", type=int, default=1, help="enlarge pixels, for small images (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument(
        "--max-sequence-length",
        type=int,
        help="T5 tokens of a prompt (default: as in the training of an export, else 256 or what the tokenizer allows)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    prompts = [*arguments.prompt, *read_prompts(arguments.prompts)]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, or --prompts FILE with one per line")
    check_at_least_one(arguments, "count", "steps", "scale", "batch_size")
    check_guidance_scales([arguments.guidance_scale])
    if arguments.negative_prompt and arguments.guidance_scale == 1:
        raise ValueError(
            "--negative-prompt is what guidance leads away from: give a --guidance-scale above 1"
        )

    from soar_mega.cli.process import start_process

    start_process()

    from soar_mega.convert import is_pipeline
    from soar_mega.data.info import bucket_size
    from soar_mega.distributed import is_rank_zero
    from soar_mega.evaluation.generate import check_image_path, image_grid, save_image

    check_image_path(arguments.out)  # before anything is computed
    size = bucket_size(arguments.size) if arguments.size else None
    pipeline_dir, _ = split_adapted(arguments.source)
    load = _pipeline if is_pipeline(pipeline_dir) else _checkpoint
    generator, encoded = load(arguments, prompts)
    images = generator.images(
        encoded,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        num_images_per_prompt=arguments.count,
        seed=arguments.seed,
        size=size,
        solver=arguments.solver,
        batch_size=arguments.batch_size,
    )
    if not is_rank_zero():
        return 0
    # one prompt, or one image per prompt, is laid out as a square rather than as a line
    columns = arguments.count if min(len(prompts), arguments.count) > 1 else max(1, round(len(images) ** 0.5))
    save_image(image_grid(images, columns), arguments.out, arguments.scale)
    print(f"{len(images)} image(s) in {arguments.out}")
    return 0


def _pipeline(arguments: argparse.Namespace, prompts: list[str]) -> "tuple[Generator, EncodedPrompts]":
    """What a pipeline folder draws with, in one process."""
    from soar_mega.evaluation.generate import Generator

    if arguments.ema or arguments.pipeline_dir or max(_layout(arguments)) > 1:
        raise ValueError(
            f"{arguments.source} is a pipeline folder: --ema, --pipeline-dir and sizes of a layout go with a checkpoint"
        )
    # before the transformer is loaded: it need not share the device with the text encoders
    pipeline_dir, adapters = split_adapted(arguments.source)
    encoded = _encoded(arguments, pipeline_dir, prompts)
    return Generator.load(pipeline_dir, arguments.dtype, arguments.shift, adapters), encoded


def _checkpoint(arguments: argparse.Namespace, prompts: list[str]) -> "tuple[Generator, EncodedPrompts]":
    """What a checkpoint draws with; its model stays cut over the ranks. Collective."""
    from soar_mega.checkpoints.model_source import find_source
    from soar_mega.config import ParallelConfig
    from soar_mega.distributed import data_size, is_rank_zero, start_world
    from soar_mega.faults.agreement import on_rank_zero

    tensor, pipeline = _layout(arguments)
    source = find_source(
        arguments.source,
        "",
        arguments.pipeline_dir,
        arguments.ema,
        arguments.shift,
        arguments.max_sequence_length,
    )
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    start_world(parallel)
    if data_size() > 1:
        raise ValueError(
            f"--tensor-model-parallel-size {tensor} and --pipeline-model-parallel-size {pipeline} take "
            f"{tensor * pipeline} process(es), and more would draw the same again: start as many"
        )
    encoded = on_rank_zero(lambda: _encoded(arguments, source.pipeline_dir, prompts))
    return source.generator(arguments.dtype, parallel, is_rank_zero()), encoded


def _layout(arguments: argparse.Namespace) -> tuple[int, int]:
    return arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size


def _encoded(arguments: argparse.Namespace, folder: str | Path, prompts: list[str]) -> "EncodedPrompts":
    from soar_mega.data.prompts import encode_prompts
    from soar_mega.models.common.build import DTYPES
    from soar_mega.models.family import read_sizes

    if arguments.negative_prompt and read_sizes(folder).guidance_embeds:
        raise ValueError(
            f"--negative-prompt: the transformer of {folder} is told a guidance scale and has no branch to lead away "
            "from: leave it out"
        )
    dtype, length = DTYPES[arguments.dtype], arguments.max_sequence_length
    return encode_prompts(folder, prompts, dtype, length, arguments.negative_prompt)


def read_prompts(path: str | None) -> list[str]:
    """The lines of a text file, without empty ones. ValueError when it is not UTF-8."""
    if path is None:
        return []
    from soar_mega.data.text_files import decode

    try:
        lines = decode(Path(path).read_bytes()).split("\n")
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return [line.strip() for line in lines if line.strip()]
