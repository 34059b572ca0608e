"""soar-mega data"""

import argparse
import json
from typing import Any

HELP = """\
Look at a set of shards that `soar-mega prepare` wrote.

  soar-mega data inspect shards/train                       counts, buckets, captions, latents
  soar-mega data inspect shards/train --json --samples 5000
  soar-mega data inspect shards/train --pipeline-dir P --contact-sheet sheet.png

With --pipeline-dir its tokenizers count the tokens of captions, and those that are cut. The contact sheet shows what
the pipeline's VAE makes of the latents: what training sees. Statistics are of --samples samples spread over the set.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "data",
        help="look at shards",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("inspect",), help="inspect: say what the shards hold")
    parser.add_argument("shards", help="shard folder")
    parser.add_argument("--pipeline-dir", default="", help="diffusers pipeline folder that encoded them")
    parser.add_argument("--samples", type=int, default=1000, help="to look at (default: %(default)s)")
    parser.add_argument(
        "--contact-sheet", metavar="FILE", help="the picture to write: png, jpg or webp; with --pipeline-dir"
    )
    parser.add_argument("--pictures", type=int, default=16, help="on the sheet (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.samples < 1 or arguments.pictures < 1:
        raise ValueError(
            f"--samples is {arguments.samples} and --pictures {arguments.pictures}: both must be at least 1"
        )
    if arguments.contact_sheet and not arguments.pipeline_dir:
        raise ValueError("--contact-sheet needs --pipeline-dir: its VAE makes pictures of latents")

    from soar_mega.cli.process import start_process

    start_process()

    from soar_mega.data.inspection import inspect
    from soar_mega.data.shards import open_shards
    from soar_mega.evaluation.generate import check_image_path

    if arguments.contact_sheet:
        check_image_path(arguments.contact_sheet)  # before anything is computed
    shards = open_shards(arguments.shards, arguments.pipeline_dir)
    found = inspect(shards, arguments.samples, arguments.pipeline_dir)
    if arguments.contact_sheet:
        found["contact_sheet"] = _draw(shards, arguments)
    print(json.dumps(found, indent=1) if arguments.json else "\n".join(_lines(found)))
    return 0


def _draw(shards: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from soar_mega.data.inspection import contact_sheet
    from soar_mega.data.vae import Decoder
    from soar_mega.evaluation.generate import save_image

    decoder = Decoder.load(Path(arguments.pipeline_dir))
    sheet, names = contact_sheet(shards, decoder, arguments.pictures)
    save_image(sheet, arguments.contact_sheet)
    return {"file": arguments.contact_sheet, "samples": names}


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['path']}: {found['samples']} samples in {found['shards']} shards, {found['bytes'] / 1e6:.1f} MB",
        "",
        f"{'bucket':>11}  {'samples':>9}  {'share':>6}  {'mean':>8}  {'std':>8}  not finite  unreadable",
    ]
    for bucket, row in sorted(found["buckets"].items(), key=lambda item: -item[1]["samples"]):
        latents = row["latents"]
        mean, std = ("-" if latents[key] is None else f"{latents[key]:.4f}" for key in ("mean", "std"))
        lines.append(
            f"{bucket:>11}  {row['samples']:>9}  {row['samples'] / found['samples']:>6.1%}  {mean:>8}  {std:>8}  "
            f"{latents['not_finite']:>10.3%}  {len(latents['unreadable']):>10}"
        )
    captions = found["captions"]
    lines += [
        "",
        f"{captions['count']} captions of {found['looked_at']} samples, {captions['empty']} of them empty",
    ]
    lines.append(f"  characters: {_said(captions['characters'])}")
    for part, row in captions["tokens"].items():
        cut = f"{row['cut']} of {captions['count']} are cut at {row['window']}"
        lines.append(f"  tokens of {part}: {_said(row)}; {cut}")
    for part, count in found["captions_cut"].items():
        lines.append(f"  {part} cut {count} when all were encoded")
    unreadable = [why for row in found["buckets"].values() for why in row["latents"]["unreadable"]]
    lines += [f"unreadable: {why}" for why in unreadable]
    if "contact_sheet" in found:
        lines.append(f"contact sheet: {found['contact_sheet']['file']}, row by row")
        lines += [f"  {name}" for name in found["contact_sheet"]["samples"]]
    return lines


def _said(row: dict[str, int]) -> str:
    return f"{row['shortest']} to {row['longest']}, median {row['median']}, 95% within {row['p95']}"
