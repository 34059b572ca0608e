"""soar-mega prepare"""

import argparse
from pathlib import Path

from soar_mega.cli.srun import adopt_srun

HELP = """\
Encode captioned images once, into shards that training reads: latents, text embeddings, captions, and an index.

  soar-mega prepare photos/ data/train --pipeline-dir models/stable-diffusion-3.5-medium --resolution 512 --dtype bf16
  soar-mega prepare list.jsonl data/train --pipeline-dir P --images images/        lines of md5, caption_en, bw, bh
  soar-mega prepare photos/ list.jsonl 's3://bucket/{000..031}.tar' data/train --pipeline-dir P --held-out-share .01
  torchrun --nproc-per-node 8 -m soar_mega prepare photos/ data/train --pipeline-dir P    also by srun, on many nodes

SOURCE is a folder of images, each with its caption beside it (fox.jpg, fox.txt or fox.caption) or all captions in
metadata.jsonl or metadata.csv (file_name, text); a list of images (.jsonl, .csv) that are in --images; a tar as
webdataset has it, also behind a url or pipe:COMMAND; parquet as Hugging Face has it. Lists, tars and parquet may give
an image several captions, with weights. An image is scaled and cropped to the nearest bucket. Images that cannot be
used (damaged, animated, no caption, NaN latents) are listed by name in rejects.jsonl, and the command fails unless
--skip-invalid. The same command goes on where it was interrupted, with any number of processes. Folders behind links
are read too; hidden files and folders, and what a NAS or macOS keeps beside images, are not. Text is UTF-8.
docs/data.md tells the whole road.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "prepare",
        help="encode images and captions into shards",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        nargs="+",
        help="folder, list (.jsonl, .csv), .tar, url, pipe:COMMAND or parquet; in any mix",
    )
    parser.add_argument("out", help="shard folder to write")
    parser.add_argument(
        "--pipeline-dir", required=True, help="diffusers pipeline folder whose encoders are used"
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="where the images of a list are")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--resolution", type=int, help="edge of the square bucket; others have about its area (default: "
                       "the transformer's own sample size)")  # fmt: skip
    sizes.add_argument(
        "--buckets", nargs="+", default=[], metavar="WxH", help="the buckets themselves, in pixels"
    )
    parser.add_argument(
        "--bucket-count", type=int, metavar="N", help="use the N of these buckets that fit the images best"
    )
    parser.add_argument("--min-bucket", type=int, default=0, metavar="IMAGES", help="drop buckets with fewer images, "
                        "which go to the nearest one that is left")  # fmt: skip
    parser.add_argument(
        "--flip", action="store_true", help="add mirrored images; breaks captions with left and right"
    )
    parser.add_argument(
        "--min-side", type=int, metavar="PIXELS", help="leave out images whose smaller side is smaller"
    )
    parser.add_argument(
        "--aspect", type=float, metavar="A", help="leave out images longer than A times their other side"
    )
    parser.add_argument("--min-score", type=float, metavar="X", help="leave out images whose score is lower")
    parser.add_argument(
        "--score-key", default="score", help="where lists have the score (default: %(default)s)"
    )
    parser.add_argument(
        "--drop-duplicates", action="store_true", help="take the first only of equal image files"
    )
    parser.add_argument(
        "--held-out-share",
        type=float,
        metavar="S",
        help="of the images, for validation in OUT/held_out, such as .01",
    )
    parser.add_argument(
        "--skip-invalid", action="store_true", help="finish without the images that cannot be used"
    )
    parser.add_argument(
        "--max-sequence-length",
        type=int,
        help="T5 tokens (default: as in the training of an export, else 256 or what the tokenizer allows)",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the embeddings (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images per forward (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=4, help="that decode images, per process (default: %(default)s)"
    )
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="(default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from soar_mega.cli.process import start_process

    adopt_srun()
    start_process()

    from soar_mega.data.prepare import prepare
    from soar_mega.data.prepare_options import Options
    from soar_mega.data.selection import Wishes

    options = Options(
        images=arguments.images,
        buckets=arguments.buckets,
        resolution=arguments.resolution,
        bucket_count=arguments.bucket_count,
        min_bucket=arguments.min_bucket,
        wishes=Wishes(
            min_side=arguments.min_side,
            aspect=arguments.aspect,
            min_score=arguments.min_score,
            drop_duplicates=arguments.drop_duplicates,
            held_out_share=arguments.held_out_share,
            flip=arguments.flip,
        ),
        score_key=arguments.score_key,
        skip_invalid=arguments.skip_invalid,
        max_sequence_length=arguments.max_sequence_length,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        samples_per_shard=arguments.samples_per_shard,
        threads=arguments.threads,
    )
    prepare(arguments.source, arguments.out, arguments.pipeline_dir, options)
    return 0
