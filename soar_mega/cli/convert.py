"""soar-mega convert"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from soar_mega.cli.adapted import split_adapted

if TYPE_CHECKING:
    from soar_mega.convert import WeightFiles
    from soar_mega.convert.weights import Weights

HELP = """\
Write weights in another form: diffusers folders, single files in the layout of a model's authors, our checkpoints.

  soar-mega convert runs/x out/                         the latest checkpoint of a run, as a pipeline
  soar-mega convert runs/x/iter_0000500 out/ --ema      the EMA weights of a certain one
  soar-mega convert runs/x out/ --pipeline-dir P        encoders and scheduler copied from P
  soar-mega convert runs/x out/ --to adapters           the adapters alone of a run that trains them (LoRA)
  soar-mega convert P out/ --lora runs/x/export_lora    a pipeline with adapters (LoRA) in its weights
  soar-mega convert runs/x out/ --lora logs/checkpoints/checkpoint-600
                                                        the export of a run, with what flow_grpo trained on it
  soar-mega convert runs/x x.safetensors                a single file, as sd3.5_large.safetensors is
  soar-mega convert sd3.5_medium.safetensors out/ --pipeline-dir P
                                                        a pipeline of a single file, the rest copied from P
  soar-mega convert P out/ --to pipeline --dtype fp16 --variant fp16
                                                        another variant of a diffusers folder
  soar-mega convert P runs/start                        a checkpoint of a transformer, for
                                                        checkpoint.load=runs/start checkpoint.finetune=true

What the source is, is seen from what is in it: the weights of a diffusers folder may have a variant or several files,
and one of them can be named itself (P/transformer/diffusion_pytorch_model.fp16.safetensors); a single file may have
names with or without model.diffusion_model. and hold other parts of a pipeline, which are left out. A checkpoint can be
converted whatever layout it was trained at; a run that is complete has its pipeline in export/ already.

Adapters are in PEFT's or in diffusers' format: a file, a folder, or a checkpoint of flow_grpo, DiffusionNFT (whose
lora/old is the policy that it samples with) or Flow-Factory. --dtype fp32 takes the optimizer's own numbers from a
checkpoint, and keeps what adapters add to weights that are bf16.

Where --to is not given, OUT is a single file if it ends in .safetensors. Else a checkpoint becomes a pipeline, or where
its run had none a transformer folder; a diffusers folder becomes a checkpoint, and with adapters a folder of its own
kind; and a single file a pipeline if --pipeline-dir is given, else a transformer folder. Weights are converted a few
rows at a time. An older output is replaced when it holds nothing but what this program wrote.
"""
FORMS = ("pipeline", "transformer", "original", "checkpoint", "adapters")
DTYPES = ("fp32", "bf16", "fp16")


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "convert",
        help="weights from one form to another",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="run folder, iter_ folder, diffusers pipeline or transformer folder, or .safetensors file",
    )
    parser.add_argument("out", help="folder or .safetensors file to write")
    parser.add_argument("--to", choices=FORMS, help="form of what is written (default: see above)")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the numbers (default: as they are)")
    parser.add_argument(
        "--variant", default="", help="part of the files' names in a diffusers folder, such as fp16"
    )
    parser.add_argument(
        "--max-shard-size",
        type=float,
        default=5.0,
        metavar="GB",
        help="of one file in it (default: %(default)s)",
    )
    parser.add_argument("--prefix", default="", help="of the names in a single file: model.diffusion_model.")
    parser.add_argument(
        "--ema", action="store_true", help="the EMA weights of a checkpoint, or of a run's export"
    )
    parser.add_argument("--lora", metavar="DIR", help="put these adapters into the weights")
    parser.add_argument("--pipeline-dir", help="copy encoders and scheduler from this pipeline folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    source = Path(arguments.source)
    if not source.exists():
        named, adapters = split_adapted(arguments.source)
        advice = f"; adapters are named apart here: {named} --lora {adapters}" if adapters else ""
        raise FileNotFoundError(f"{source}: no such file or folder{advice}")
    if arguments.lora:
        source = _to_adapt(source, arguments)
    is_weights = source.is_file() or any(
        (source / name).is_file() for name in ("model_index.json", "config.json")
    )
    form = arguments.to or _usual_form(arguments, source, is_weights)
    _check(arguments, form, is_weights)

    from soar_mega.cli.process import start_process

    start_process()

    from soar_mega.convert import WeightFiles
    from soar_mega.convert.safetensors_reader import DTYPES as BY_NAME

    files = WeightFiles(
        int(arguments.max_shard_size * 10**9), arguments.variant, BY_NAME.get(arguments.dtype or "")
    )
    convert = _from_weights if is_weights else _from_checkpoint
    print(f"wrote {convert(arguments, form, files)}")
    return 0


def _to_adapt(run: Path, arguments: argparse.Namespace) -> Path:
    """What adapters are put into: of a run its export, which outside trainers start from."""
    from soar_mega.checkpoints.run_folder import RECIPE

    export = run / ("export_ema" if arguments.ema else "export")
    if not (run / RECIPE).is_file():
        return run
    if not export.is_dir():
        raise ValueError(f"{run} has no {export.name} to put adapters into: convert its checkpoint first")
    arguments.source, arguments.ema = str(export), False
    return export


def _usual_form(arguments: argparse.Namespace, source: Path, is_weights: bool) -> str:
    if arguments.out.endswith(".safetensors"):
        return "original"
    if is_weights and source.is_dir() and not arguments.lora:
        return "checkpoint"
    if is_weights and not arguments.pipeline_dir and not (source / "model_index.json").is_file():
        return "transformer"
    return "pipeline"


def _check(arguments: argparse.Namespace, form: str, is_weights: bool) -> None:
    """ValueError for options that the form has no use for."""
    if is_weights and (arguments.ema or form == "adapters"):
        raise ValueError(
            f"{arguments.source} holds one set of weights: --ema and --to adapters go with a checkpoint"
        )
    if form == "checkpoint" and not is_weights:
        raise ValueError(f"{arguments.source} is a checkpoint already: give another form with --to")
    if arguments.lora and not is_weights:
        raise ValueError(
            f"{arguments.source} is a checkpoint: adapters are put into weights, as in its run's export"
        )
    if form == "checkpoint" and arguments.dtype == "fp16":
        raise ValueError("--dtype: a checkpoint holds fp32 or bf16, which are trained in")
    if form == "adapters" and arguments.dtype:
        raise ValueError("--dtype: adapters are written in the type of their run")
    if arguments.variant and form not in ("pipeline", "transformer"):
        raise ValueError(f"--variant goes with a pipeline or transformer folder, not with --to {form}")
    if arguments.prefix and form != "original":
        raise ValueError("--prefix goes with --to original")
    if not arguments.max_shard_size > 0:
        raise ValueError("--max-shard-size must be above 0")
    if form == "original" and not arguments.out.endswith(".safetensors"):
        raise ValueError(f"{arguments.out}: a single file ends in .safetensors")
    if form == "pipeline" and is_weights and Path(arguments.source).is_file() and not arguments.pipeline_dir:
        raise ValueError(
            "a pipeline of a single file needs --pipeline-dir, from which the other parts are copied"
        )


def _from_checkpoint(arguments: argparse.Namespace, form: str, files: "WeightFiles") -> str:
    from soar_mega.checkpoints.adapters import checkpoint_to_adapters
    from soar_mega.checkpoints.exchange import checkpoint_to_folder, checkpoint_to_original_file

    source, out = arguments.source, arguments.out
    if form == "adapters":
        checkpoint_to_adapters(source, out, arguments.ema)
        return f"{out}, adapters in PEFT's and in diffusers' format"
    if form == "original":
        checkpoint_to_original_file(source, out, arguments.ema, files, arguments.prefix)
        return f"{out}, a single file"
    only = form == "transformer"
    whole = checkpoint_to_folder(source, out, arguments.pipeline_dir, arguments.ema, files, only)
    return f"{out}, a diffusers {'pipeline' if whole else 'transformer'} folder"


def _from_weights(arguments: argparse.Namespace, form: str, files: "WeightFiles") -> str:
    from soar_mega.checkpoints.exchange import weights_to_checkpoint
    from soar_mega.convert.change_form import to_original_file, to_pipeline_folder, to_transformer_folder
    from soar_mega.convert.weights import open_weights
    from soar_mega.outputs import refuse_overlap
    from soar_mega.training_facts import facts_of_copy

    source, out = arguments.source, arguments.out
    if arguments.lora:
        refuse_overlap(out, {"the adapters": arguments.lora})
    with open_weights(Path(source), arguments.pipeline_dir) as stored:
        weights = _adapted(stored, arguments.lora)
        if form == "checkpoint":
            return str(weights_to_checkpoint(weights, source, out, arguments.dtype or "fp32"))
        if form == "original":
            to_original_file(weights, out, files, arguments.prefix)
            return f"{out}, a single file"
        if form == "pipeline":
            facts = facts_of_copy(source, files.dtype_name, is_changed=bool(arguments.lora))
            to_pipeline_folder(weights, arguments.pipeline_dir or source, out, files, facts)
        else:
            to_transformer_folder(weights, out, files)
    return f"{out}, a diffusers {form} folder"


def _adapted(weights: "Weights", lora: str | None) -> "Weights":
    if not lora:
        return weights
    from soar_mega.convert.merging import with_adapters

    return with_adapters(weights, lora)
