"""Models through a suite, one after the other, and the report over all of them."""

import dataclasses
import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from soar_mega.checkpoints.lineage import code_version, content_hash
from soar_mega.checkpoints.model_source import CHECKPOINT, DIFFUSERS, Source
from soar_mega.config import ParallelConfig
from soar_mega.data.shard_writer import DATASET_FILE
from soar_mega.data.shards import ShardSet, open_shards
from soar_mega.distributed import data_rank, data_size, device, is_first_of_replica, is_rank_zero
from soar_mega.evaluation.generate import Generator
from soar_mega.evaluation.scorer import Scorer
from soar_mega.evaluation.suite.distances import distance
from soar_mega.evaluation.suite.exposure import measure_drift
from soar_mega.evaluation.suite.keyed_images import DiffusersDrawer, Drawer, Drawn, KeyedDrawer, encode_alone
from soar_mega.evaluation.suite.one_model import Cell, Place, run_model
from soar_mega.evaluation.suite.page import write_page
from soar_mega.evaluation.suite.prompt_sets import PromptSet
from soar_mega.evaluation.suite.store import Json, Store, digest
from soar_mega.evaluation.suite.suite_settings import Suite
from soar_mega.evaluation.suite.tables import Measured, Tables, to_csv
from soar_mega.faults.agreement import on_all_ranks, on_rank_zero
from soar_mega.training.history import history

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Something that is evaluated.

    Attributes:
        size: (width, height) in pixels, in the place of the suite's.
    """

    name: str
    source: Source
    size: tuple[int, int] | None = None

    @property
    def file_name(self) -> str:
        """Its name in those of files."""
        return re.sub(r"[^\w.#-]", "_", self.name)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A suite in its folder.

    Attributes:
        scorers: by name, all that the sets ask for.
        parallel: the layout of checkpoints.
        batch_size: images drawn together.
        weights_dir: of scorers and of the network that FID looks with.
    """

    store: Store
    suite: Suite
    sets: Sequence[PromptSet]
    scorers: dict[str, Scorer]
    parallel: ParallelConfig
    dtype: str
    batch_size: int
    weights_dir: str

    def measure(self, model: Model) -> Measured:
        """Draws and scores what is not there yet of one model, and reads the rest. Collective over the world.

        Raises:
            ValueError: the model cannot be read or drawn with, or a scorer gives no value.
            OSError: something cannot be read or written; what is there stays.
        """
        source = model.source
        drawn = Drawn(
            size=model.size or self.suite.size,
            solver=self.suite.solver,
            seed=self.suite.seed,
            dtype=self.dtype,
            batch_size=self.batch_size,
        )
        facts = on_rank_zero(lambda: self._facts(model))
        fingerprint = facts["fingerprint"]
        place = _place(source)
        shards = self._shards(source)

        @functools.cache
        def generator() -> Generator:
            # a run may remove a checkpoint when some ranks have read it and others have not
            return on_all_ranks(lambda: source.generator(self.dtype, self.parallel, place.writes))

        def drawer(prompts: list[str]) -> Drawer:
            if source.kind == DIFFUSERS:
                return DiffusersDrawer(source.path, drawn)
            # before the transformer: the text encoders are gone when it comes
            encoded = encode_alone(source.pipeline_dir, prompts, self.dtype, source.max_sequence_length)
            return KeyedDrawer(generator(), prompts, encoded, drawn)

        cells = self._cells(model, fingerprint, drawn)
        run_model(model.name, cells, place, drawer, self.batch_size)
        distances = on_rank_zero(
            lambda: [distance(self.store, each, self.weights_dir, device()) for each in cells]
        )
        return Measured(
            name=model.name,
            path=facts["path"],
            images={(cell.point, cell.prompt_set.name): cell.images for cell in cells},
            values={(cell.point, cell.prompt_set.name): cell.values() for cell in cells if is_rank_zero()},
            distances={
                (cell.point, cell.prompt_set.name): found for cell, found in zip(cells, distances) if found
            },
            history=facts["training"],
            drift=self._drift(model, fingerprint, shards, generator, place) if shards is not None else None,
        )

    def _facts(self, model: Model) -> Json:
        """Where a model is, what its images depend on, and the training behind it; kept for when it is gone.

        A run removes its older checkpoints: what was drawn with them stays in the report, where nothing but the weights
        is asked for otherwise now. ValueError where something is.
        """
        source = model.source
        name = f"facts/{model.file_name}.json"
        path = str(source.path) + (f"+{source.adapters}" if source.adapters else "")
        known = self.store.read_json(name)
        if known is not None and known["path"] == path and not source.path.exists():
            for key, now in source.surroundings().items():
                if (before := known["fingerprint"].get(key)) != now:
                    raise ValueError(
                        f"{self.store.path / name}: its images were drawn with {key} {before}, {now} is asked for now, "
                        f"and {source.path} is gone"
                    )
            return known
        training = history(source.adapters or source.path)
        facts = {"path": path, "fingerprint": source.fingerprint(), "training": training}
        self.store.write_json(name, facts)
        return facts

    def _cells(self, model: Model, fingerprint: Json, drawn: Drawn) -> list[Cell]:
        said = {"model": fingerprint} | dataclasses.asdict(drawn)
        del said["batch_size"]
        make = functools.partial(Cell, self.store, model.file_name, drawn=said, rank=dist.get_rank())
        return [
            make(prompt_set=each, point=point, scorers=[self.scorers[name] for name in each.settings.scorers])
            for each in self.sets
            for point in self.suite.points
        ]

    def _shards(self, source: Source) -> ShardSet | None:
        """What drift is measured on; None where it is not, as of a model that diffusers draws."""
        held_out = self.suite.drift.held_out
        return (
            open_shards(held_out, str(source.pipeline_dir)) if held_out and source.kind != DIFFUSERS else None
        )

    def _drift(self, model: Model, fingerprint: Json, shards: ShardSet, generator: Any, place: Place) -> Json:
        """Collective."""
        settings = dataclasses.asdict(self.suite.drift)
        said = {
            "model": fingerprint,
            "dtype": self.dtype,
            "guidance_scales": list(self.suite.guidance_scales),
            **settings,
            "held_out": on_rank_zero(lambda: content_hash(f"{self.suite.drift.held_out}/{DATASET_FILE}")),
        }
        name = f"drift/{model.file_name}-{digest(said)}.json"
        known = on_rank_zero(lambda: self.store.read_json(name))
        if known is not None:
            return known
        log.info("%s: drift on %d held-out samples", model.name, self.suite.drift.samples)
        found = measure_drift(generator(), shards, self.suite.drift, self.suite.guidance_scales, place)
        on_rank_zero(lambda: self.store.write_json(name, found))
        return found

    def report(self, models: Sequence[Measured]) -> Tables:
        """Writes the report over some models; by rank 0."""
        tables = Tables(suite=self.suite, sets=self.sets, models=models)
        said = tables.report() | {
            "code": code_version(),
            "dtype": self.dtype,
            "scorers": {
                scorer.name: {"version": scorer.version, "weights": scorer.weights_hash}
                for scorer in self.scorers.values()
            },
        }
        self.store.write_json("report.json", said)
        self.store.write("table.csv", to_csv(said["scores"]))
        self.store.write("outcomes.csv", to_csv(tables.outcome_rows()))
        self.store.write("report.html", write_page(tables, said))
        return tables


def _place(source: Source) -> Place:
    """A checkpoint lies on the ranks of a replica, which draw together; everything else is whole on each rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if source.kind == CHECKPOINT:
        return Place(
            replica=data_rank(),
            replicas=data_size(),
            writes=is_first_of_replica(),
            rank=rank,
            world_size=world,
        )
    return Place(replica=rank, replicas=world, writes=True, rank=rank, world_size=world)
