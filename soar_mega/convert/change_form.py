"""From one form of a transformer's weights to another, a few rows at a time, in one process.

Every function raises ValueError where the weights are not what they should be (`Weights`), or where there is what this
program did not write, and OSError where it cannot be written.
"""

from pathlib import Path

from soar_mega.convert.original_file import OriginalWriter
from soar_mega.convert.pipeline_folder import copy_parts, pipeline_parts, refuse_other_transformer
from soar_mega.convert.safetensors_writer import MARK
from soar_mega.convert.save import AS_STORED, WeightFiles, start_folder
from soar_mega.convert.weights import Weights
from soar_mega.outputs import OutputFolder, in_place_of, refuse_overlap
from soar_mega.training_facts import FILE, TrainingFacts


def to_transformer_folder(weights: Weights, out: str | Path, files: WeightFiles = AS_STORED) -> None:
    """Write a diffusers transformer folder."""
    with OutputFolder(out).writing() as new:
        _write_transformer(weights, new, files)


def to_pipeline_folder(
    weights: Weights,
    pipeline_dir: str | Path,
    out: str | Path,
    files: WeightFiles = AS_STORED,
    facts: TrainingFacts | None = None,
) -> None:
    """Write a diffusers pipeline folder, whose other parts are copied from `pipeline_dir`; facts: of the weights."""
    source = Path(pipeline_dir)
    refuse_overlap(out, {"the pipeline": source})
    refuse_other_transformer(source, weights.sizes.family.class_name)
    with OutputFolder(out).writing() as new:
        copy_parts(source, pipeline_parts(source), new)
        if facts is not None:
            (new / FILE).write_text(facts.to_json(), encoding="utf-8")
        _write_transformer(weights, new / "transformer", files)


def to_original_file(
    weights: Weights, out: str | Path, files: WeightFiles = AS_STORED, prefix: str = ""
) -> None:
    """Write a single file in the layout of the weights' family."""
    dtypes = {key: files.dtype or dtype for key, dtype in weights.dtypes().items()}
    with in_place_of(out, MARK.encode()) as new:
        weights.copy_to(OriginalWriter(new, weights.sizes, weights.shapes, dtypes, prefix))


def _write_transformer(weights: Weights, folder: Path, files: WeightFiles) -> None:
    config = weights.sizes.to_diffusers()
    weights.copy_to(start_folder(folder, config, weights.shapes, weights.dtypes(), files))
