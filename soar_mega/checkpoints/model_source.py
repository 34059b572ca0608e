"""What draws images: a pipeline folder, with adapters or without, a checkpoint at any layout, or a pipeline of another
architecture in diffusers' own classes."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.checkpoints.adapters import holds_adapters, load_adapted_checkpoint
from soar_mega.checkpoints.exchange import load_model, pipeline_of
from soar_mega.checkpoints.lineage import content_hash
from soar_mega.checkpoints.manifest import MANIFEST
from soar_mega.checkpoints.resume import find_checkpoint
from soar_mega.config import ParallelConfig
from soar_mega.convert import is_pipeline
from soar_mega.data.encoder_facts import encoder_facts
from soar_mega.data.fingerprints import fingerprints
from soar_mega.data.vae import Decoder
from soar_mega.distributed import start_world
from soar_mega.evaluation.generate import Generator, schedule_of
from soar_mega.faults.agreement import on_rank_zero
from soar_mega.models.family import families
from soar_mega.training_facts import read_facts
from soar_mega.user_files import read_object

log = logging.getLogger(__name__)

PIPELINE, CHECKPOINT, DIFFUSERS = "pipeline", "checkpoint", "diffusers"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights that draw.

    Attributes:
        kind: of PIPELINE, CHECKPOINT, DIFFUSERS.
        path: the pipeline folder or the checkpoint.
        pipeline_dir: where the encoders are.
        adapters: put on the transformer of a pipeline; "" for none.
        ema: the EMA weights of a checkpoint.
        shift: of the timesteps; None: the pipeline's scheduler's.
    """

    kind: str
    path: Path
    pipeline_dir: Path
    adapters: str = ""
    ema: bool = False
    shift: float | None = None
    max_sequence_length: int | None = None

    def fingerprint(self) -> dict[str, Any]:
        """What its images depend on beside how they are sampled; reads all weights."""
        said = self.surroundings()
        if self.kind == DIFFUSERS:
            return said | {"weights": content_hash(self.path)}
        if self.kind == CHECKPOINT:
            return said | {"weights": content_hash(self.path / MANIFEST)}
        adapters = content_hash(self.adapters) if self.adapters else ""
        return said | {"weights": content_hash(self.path / "transformer"), "adapters": adapters}

    def surroundings(self) -> dict[str, Any]:
        """The part of the fingerprint that is not of the weights, and can be told when they are gone."""
        said: dict[str, Any] = {"kind": self.kind, "shift": self.shift}
        if self.kind == DIFFUSERS:
            return said
        said |= {
            "encoders": fingerprints(self.pipeline_dir),
            "max_sequence_length": self._drawn_length(),
        }
        if self.shift is None:
            said["scheduler"] = content_hash(self.pipeline_dir / "scheduler")
        if self.kind == CHECKPOINT:
            said["ema"] = self.ema
        return said

    def text_length(self) -> int:
        """T5 tokens of a prompt. Warns where an export of ours says that it was trained with another number."""
        used = self._drawn_length()
        facts = read_facts(self.path)
        trained = None if facts is None else facts.max_sequence_length
        if trained not in (None, used):
            log.warning(
                "%s was trained with %d T5 tokens of a prompt and is drawn with %d",
                *(self.path, trained, used),
            )
        return used

    def _drawn_length(self) -> int:
        return encoder_facts(self.pipeline_dir, self.max_sequence_length).max_sequence_length

    def generator(self, dtype: str, parallel: ParallelConfig, decodes: bool) -> Generator:
        """The transformer in our implementation, ready to draw. Collective for a checkpoint, which stays cut.

        Args:
            parallel: the layout of a checkpoint.
            decodes: whether this rank gets the images of a checkpoint.
        """
        assert self.kind != DIFFUSERS, "diffusers draws it"
        if self.kind == PIPELINE:
            return Generator.load(self.path, dtype, self.shift, self.adapters)
        start_world(parallel)
        if on_rank_zero(lambda: holds_adapters(self.path)):
            return self._adapted(dtype, parallel)
        model = load_model(self.path, dtype, parallel, self.ema)
        return Generator(
            facts=encoder_facts(self.pipeline_dir),
            velocity=model.velocity,
            is_told=model.model.sizes.guidance_embeds,
            decoder=Decoder.load(self.pipeline_dir) if decodes else None,
            schedule=schedule_of(self.pipeline_dir, self.shift),
        )

    def _adapted(self, dtype: str, parallel: ParallelConfig) -> Generator:
        if max(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) > 1:
            raise ValueError(
                f"{self.path} holds adapters, and the model under them lies whole in each process: leave out "
                "--tensor-model-parallel-size and --pipeline-model-parallel-size"
            )
        model = load_adapted_checkpoint(self.path, dtype, self.ema)
        return Generator.of(model, self.pipeline_dir, self.shift)


def find_source(
    path: str,
    adapters: str = "",
    pipeline_dir: str | Path | None = None,
    ema: bool = False,
    shift: float | None = None,
    max_sequence_length: int | None = None,
) -> Source:
    """What a path means: a pipeline folder, or a run or iter_ folder.

    Raises:
        ValueError: it is neither, or what goes with one was said of the other.
    """
    settings: dict[str, Any] = {"shift": shift, "max_sequence_length": max_sequence_length}
    if not is_pipeline(path):
        if not Path(path).is_dir():
            raise ValueError(
                f"{path} is no folder: give a diffusers pipeline folder, a run or an iter_ folder"
            )
        if adapters:
            raise ValueError(f"{path} is no pipeline folder, and adapters are put on those")
        folder = pipeline_of(path, pipeline_dir)
        return Source(kind=CHECKPOINT, path=find_checkpoint(path), pipeline_dir=folder, ema=ema, **settings)
    if ema or pipeline_dir:
        raise ValueError(f"{path} is a pipeline folder: --ema and --pipeline-dir go with a checkpoint")
    kind = PIPELINE if _is_known(Path(path)) else DIFFUSERS
    if kind == DIFFUSERS and (adapters or shift is not None):
        raise ValueError(
            f"{path} is of another architecture, drawn by diffusers: without adapters and --shift"
        )
    return Source(kind=kind, path=Path(path), pipeline_dir=Path(path), adapters=adapters, **settings)


def _is_known(folder: Path) -> bool:
    config = folder / "transformer" / "config.json"
    return config.is_file() and read_object(config).get("_class_name") in list(families())


SIZE = re.compile(r"(.+)@(\d+x\d+)")


def split_size(text: str) -> tuple[str, str]:
    """The parts of MODEL@WIDTHxHEIGHT; "" for no size."""
    found = SIZE.fullmatch(text)
    return (found[1], found[2]) if found and not Path(text).exists() else (text, "")
