"""soar-mega prepare"""

import argparse

HELP = """\
Encode captioned images once, into shards that training reads: latents, text embeddings, captions, and an index.

  soar-mega prepare photos/ shards/train --pipeline-dir stable-diffusion-3.5-medium --resolution 512 --dtype bf16
  soar-mega prepare list.jsonl shards/train --pipeline-dir P --images images/        lines of md5, caption_en, bw, bh
  soar-mega prepare canvases/ shards/train --pipeline-dir recipes/tiny/base

SOURCE is a folder of images, each with its caption beside it (fox.jpg, fox.txt) or all captions in metadata.jsonl
(file_name, text), or a JSONL list of images named md5.jpg in --images. An image is scaled and cropped to the nearest
bucket. Images that cannot be used (damaged, animated, no caption, NaN latents) are listed by name in rejects.jsonl, and
the command fails unless --skip-invalid. The same command goes on where it was interrupted. Folders behind links are
read too; hidden files and folders, and what a NAS or macOS keeps beside images, are not. Text is UTF-8.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "prepare",
        help="encode images and captions into shards",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="image folder with captions, or a JSONL list")
    parser.add_argument("out", help="shard folder to write")
    parser.add_argument(
        "--pipeline-dir", required=True, help="diffusers pipeline folder whose encoders are used"
    )
    parser.add_argument("--images", metavar="FOLDER", help="where the images of a JSONL list are")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--resolution", type=int, help="edge of the square bucket; others have about its area (default: "
                       "the transformer's own sample size)")  # fmt: skip
    sizes.add_argument(
        "--buckets", nargs="+", default=[], metavar="WxH", help="the buckets themselves, in pixels"
    )
    parser.add_argument(
        "--flip", action="store_true", help="add mirrored images; breaks captions with left and right"
    )
    parser.add_argument(
        "--skip-invalid", action="store_true", help="finish without the images that cannot be used"
    )
    parser.add_argument(
        "--max-sequence-length", type=int, help="T5 tokens (default: 256, or what the tokenizer allows)"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the embeddings (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images per forward (default: %(default)s)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="(default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from soar_mega.cli.process import start_process

    start_process()

    from soar_mega.data.prepare import prepare

    prepare(
        arguments.source,
        arguments.out,
        arguments.pipeline_dir,
        images=arguments.images,
        buckets=arguments.buckets,
        resolution=arguments.resolution,
        flip=arguments.flip,
        skip_invalid=arguments.skip_invalid,
        max_sequence_length=arguments.max_sequence_length,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        samples_per_shard=arguments.samples_per_shard,
    )
    return 0
