"""soar-mega sample"""

import argparse
import math
from pathlib import Path

HELP = """\
Draw images with a diffusers SD3 pipeline folder: its encoders, its transformer in our implementation, our sampler.

  soar-mega sample recipes/tiny/base --prompt "a red 3" --guidance-scale 3 --out three.png
  soar-mega sample recipes/tiny/base+runs/x/export_lora --prompt "a red 3" --guidance-scale 3
  soar-mega sample runs/x/export --prompts prompts.txt --count 4 --steps 40 --out grid.png

PIPELINE+ADAPTERS puts adapters (LoRA) on the transformer, in PEFT's or in diffusers' format.

Each prompt is a row of the picture, with --count images that start from different noise. The same seed gives the same
picture at any batch size. Guidance scale 1 is sampling without classifier-free guidance.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "sample",
        help="draw images with a pipeline folder",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "pipeline_dir",
        metavar="PIPELINE[+ADAPTERS]",
        help="diffusers pipeline folder, for example export/ of a run",
    )
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; give it again for more rows")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt per line")
    parser.add_argument(
        "--out", default="grid.png", help="the picture to write: png, jpg or webp (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=1, help="images per prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="sampler steps (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=4.5, help="(default: %(default)s)")
    parser.add_argument("--solver", choices=("euler", "heun"), default="euler", help="(default: %(default)s)")
    parser.add_argument("--shift", type=float, help="timestep shift (default: the pipeline's scheduler's)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--size", metavar="WxH", help="pixels (default: the transformer's own sample size)")
    parser.add_argument(
        "--scale", type=int, default=1, help="enlarge pixels, for small images (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument(
        "--max-sequence-length",
        type=int,
        help="T5 tokens of a prompt, as in training (default: 256, or what the tokenizer allows)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    prompts = [*arguments.prompt, *read_prompts(arguments.prompts)]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, or --prompts FILE with one per line")
    for name in ("count", "steps", "scale", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if not math.isfinite(arguments.guidance_scale):
        raise ValueError(f"--guidance-scale must be a number, not {arguments.guidance_scale}")

    from soar_mega.cli.process import start_process

    start_process()

    from soar_mega.convert.lora import split_adapted
    from soar_mega.data.info import bucket_size
    from soar_mega.data.prompts import encode_prompts
    from soar_mega.evaluation.generate import Generator, check_image_path, image_grid, save_image
    from soar_mega.models.common.build import DTYPES

    check_image_path(arguments.out)  # before anything is computed
    size = bucket_size(arguments.size) if arguments.size else None
    pipeline_dir, adapters = split_adapted(arguments.pipeline_dir)
    # before the transformer is loaded: it need not share the device with the text encoders
    encoded = encode_prompts(pipeline_dir, prompts, DTYPES[arguments.dtype], arguments.max_sequence_length)
    generator = Generator.load(pipeline_dir, arguments.dtype, arguments.shift, adapters)
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
    # one prompt, or one image per prompt, is laid out as a square rather than as a line
    columns = arguments.count if min(len(prompts), arguments.count) > 1 else max(1, round(len(images) ** 0.5))
    save_image(image_grid(images, columns), arguments.out, arguments.scale)
    print(f"{len(images)} image(s) in {arguments.out}")
    return 0


def read_prompts(path: str | None) -> list[str]:
    """The lines of a text file, without empty ones. ValueError when it is not UTF-8."""
    if path is None:
        return []
    from soar_mega.data.text_files import decode

    try:
        lines = decode(Path(path).read_bytes()).splitlines()
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return [line.strip() for line in lines if line.strip()]
