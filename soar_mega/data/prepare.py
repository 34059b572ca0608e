"""Captioned images to shards of latents and embeddings: the work of `soar-mega prepare`.

The first process lists the sources; all look at the images; the first one settles what is encoded into which shard; all
write shards, each the next that nobody has begun; the first one finishes. What a shard holds depends on the sources and
the settings alone, so a prepare that was interrupted goes on behind its complete shards with any number of processes.
dataset.json comes last, and only when rejects are allowed or there are none.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from soar_mega import distributed
from soar_mega.data import prepare_folder
from soar_mega.data.bucket_choice import choose_buckets
from soar_mega.data.encoder_facts import encoder_facts
from soar_mega.data.fetched import copy_of, expand, fetch, is_copied, is_remote
from soar_mega.data.fingerprints import fingerprints
from soar_mega.data.finishing import finish
from soar_mega.data.image_sources import list_items
from soar_mega.data.info import DatasetInfo
from soar_mega.data.items import Item, Reject
from soar_mega.data.json_files import write_bytes
from soar_mega.data.loaded_encoders import Encoders
from soar_mega.data.prepare_folder import FETCHED_FOLDER, HELD_OUT_FOLDER, SURVEY_FOLDER, Lock, complete_shard
from soar_mega.data.prepare_options import DTYPES, Options
from soar_mega.data.processes import Processes
from soar_mega.data.rejects import REJECTS_FILE, read_rejects, write_duplicates, write_rejects
from soar_mega.data.selection import Selection
from soar_mega.data.shard_files import read_dataset_file
from soar_mega.data.shard_job import ShardJob
from soar_mega.data.shard_plan import Plan, PlannedShard
from soar_mega.data.shard_writer import DATASET_FILE, EMPTY_FILE, FORMAT_VERSION
from soar_mega.data.survey import Seen, Survey
from soar_mega.outputs import refuse_overlap

log = logging.getLogger(__name__)

DEFAULTS = Options()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a finished `prepare` made, but for the held-out set."""

    folder: Path
    samples: int
    buckets: dict[str, int]
    rejects: list[Reject]


def prepare(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    pipeline_dir: str | Path,
    options: Options = DEFAULTS,
) -> Prepared:
    """Encode captioned images with the encoders of a pipeline into shards in `out`.

    The same call on an unfinished folder goes on where it stopped; on a finished one it does nothing. Collective over
    the processes that torchrun's environment names, which share the folder.

    Args:
        sources: see `image_sources.list_items`; several are taken one after the other.

    Raises:
        ValueError: bad arguments, a folder made with others or by others, one that the source lies in or around, or
            samples that cannot be used, by name.
    """
    given = [str(s) for s in ([sources] if isinstance(sources, str | Path) else sources)]
    processes = Processes()
    try:
        preparation = processes.together(
            lambda: _Preparation(processes, expand(given), Path(out), Path(pipeline_dir), options)
        )
        return preparation.run()
    finally:
        processes.close()


class _Preparation:
    def __init__(
        self, processes: Processes, sources: list[str], folder: Path, pipeline_dir: Path, options: Options
    ) -> None:
        self._processes = processes
        self._sources = sources
        self._folder = folder
        self._pipeline_dir = pipeline_dir
        self._options = options
        self._check()
        self._facts = encoder_facts(pipeline_dir, options.max_sequence_length)
        self._buckets = options.possible_buckets(self._facts)
        self._info = self._facts.dataset_info({}, DTYPES[options.dtype], fingerprints(pipeline_dir))
        self._settings = {
            "format_version": FORMAT_VERSION,
            "encoders": self._info.encoders,
            "buckets": self._buckets,
            "bucket_count": options.bucket_count,
            "min_bucket": options.min_bucket,
            **asdict(options.wishes),
            "score_key": options.score_key,
            "max_sequence_length": self._facts.max_sequence_length,
            "dtype": options.dtype,
            "samples_per_shard": options.samples_per_shard,
        }
        self._survey = Survey(folder / SURVEY_FOLDER)
        self._listed_rejects: list[Reject] = []
        self._encoders: Encoders | None = None

    def _check(self) -> None:
        local = [source for source in self._sources if not is_remote(source)]
        inputs: dict[str, str | Path] = {"the folder of images": self._options.images or ""}
        for source in local:
            inputs["the source" if len(local) == 1 else f"the source {source}"] = source
        refuse_overlap(self._folder, inputs | {"the pipeline": self._pipeline_dir})
        if missing := [source for source in local if not Path(source).exists()]:
            raise ValueError(f"there is no source {missing[0]}")
        self._options.check()

    def run(self) -> Prepared:
        """All steps; each begins when all processes are done with the one before."""
        processes = self._processes
        lock = processes.together(lambda: Lock(self._folder))
        try:
            processes.first_alone(lock.take)
            processes.together(lock.share)
            if processes.first_alone(self._begin):
                return processes.together(self._result)
            processes.together(self._fetch)
            parts = processes.first_alone(self._list)
            processes.together(lambda: self._look(parts))
            if processes.first_alone(lambda: self._settle(parts)):
                processes.together(self._encode)
                processes.first_alone(self._finish)
            return processes.together(self._result)
        finally:
            lock.close()

    def _begin(self) -> bool:
        """Whether the folder is finished and there is nothing on this machine to compare it with."""
        if not prepare_folder.is_finished(self._folder):
            prepare_folder.begin(self._folder, self._settings)
            return False
        values = read_dataset_file(self._folder)
        path = self._folder / DATASET_FILE
        if not isinstance(values.get("settings"), dict):
            raise ValueError(f"{path} names no settings: `soar-mega prepare` did not write it")
        prepare_folder.refuse_other_settings(self._folder, values["settings"], self._settings)
        remote = any(is_remote(source) for source in self._sources)
        if remote:
            log.info("%s is finished already; its remote sources are not looked at again", self._folder)
        return remote

    def _fetch(self) -> None:
        # each once, for two processes cannot write one copy; a source may be given twice to weigh more
        copied = list(dict.fromkeys(source for source in self._sources if is_copied(source)))
        for number in self._processes.shares("sources", len(copied)):
            fetch(copied[number], self._local(copied[number]))

    def _local(self, source: str) -> Path:
        return copy_of(source, self._folder / FETCHED_FOLDER) if is_copied(source) else Path(source)

    def _list(self) -> int:
        """Write down all items of the sources; how many parts these are to be looked at in."""
        listed: list[Item] = []
        for source in self._sources:
            items, rejects = list_items(self._local(source), self._options.images, self._options.score_key)
            if len(self._sources) > 1:
                items = [replace(item, name=f"{source}: {item.name}") for item in items]
                rejects = [replace(reject, name=f"{source}: {reject.name}") for reject in rejects]
            listed += items
            self._listed_rejects += rejects
        return self._survey.write_list(listed)

    def _look(self, parts: int) -> None:
        for part in self._processes.shares("parts", parts):
            self._survey.look(part, self._options.threads)

    def _settle(self, parts: int) -> int:
        """What goes where: how many shards; 0 for a finished folder, of which all is still the same."""
        wishes = self._options.wishes
        selection = Selection(wishes, self._chosen_buckets(parts), self._facts)
        plan = self._planned(parts, selection)
        if prepare_folder.is_finished(self._folder):
            self._tidy(plan)
            for name in ("", HELD_OUT_FOLDER):
                self._refuse_other_digests(self._folder / name, [shard.digest for shard in plan.of(name)])
            log.info("%s is finished already", self._folder)
            return 0
        rejects = self._listed_rejects + selection.rejects
        write_duplicates(self._folder, selection.duplicates, wishes.drop_duplicates)
        write_rejects(self._folder, rejects, plan.source_samples, self._options.skip_invalid)
        if not plan.of(""):
            raise ValueError(
                f"none of the {plan.source_samples} samples can be used (see {self._folder / REJECTS_FILE})"
            )
        if wishes.held_out_share is not None and not plan.of(HELD_OUT_FOLDER):
            raise ValueError(
                f"held_out_share {wishes.held_out_share} of {plan.source_samples} samples holds none: give a "
                "larger one"
            )
        for shard in plan.shards:
            (self._folder / shard.folder).mkdir(exist_ok=True)
        return len(plan.shards)

    def _refuse_other_digests(self, folder: Path, digests: list[str]) -> None:
        """Of the shards of a finished set; one that was moved away is not looked for."""
        if prepare_folder.is_finished(folder) and read_dataset_file(folder).get("digests") != digests:
            raise ValueError(
                f"{folder} was made of other images or captions: remove it or give another folder"
            )

    def _chosen_buckets(self, parts: int) -> list[str]:
        """Those of the possible buckets that the images are brought to."""
        count, least = self._options.bucket_count, self._options.min_bucket
        if count is None and least == 0:
            return self._buckets
        selection = Selection(self._options.wishes, self._buckets, self._facts)
        shapes = np.array([s for part in range(parts) for s in selection.shapes(self._pairs(part))])
        chosen = choose_buckets(np.sort(shapes), self._buckets, count, least)
        log.info("%d of %d buckets are used: %s", len(chosen), len(self._buckets), ", ".join(chosen))
        return chosen

    def _pairs(self, part: int) -> list[tuple[Item, Seen]]:
        return list(zip(self._survey.items(part), self._survey.seen(part), strict=True))

    def _planned(self, parts: int, selection: Selection) -> Plan:
        """What `selection` chooses of all parts, in shards."""
        plan = Plan(folder=self._folder / SURVEY_FOLDER)
        for part in range(parts):
            pairs = self._pairs(part)
            plan.source_samples += len(pairs)
            plan.add(selection.choose(pairs), self._options.samples_per_shard)
        plan.source_samples += len(self._listed_rejects)
        plan.finish()
        return plan

    def _encode(self) -> None:
        """Write shards that are not there yet."""
        plan = Plan.read(self._folder / SURVEY_FOLDER)
        if self._processes.rank == 0:
            self._write_empty(plan)
        total = sum(shard.samples for shard in plan.shards)
        # disable=None: silent when nobody looks
        hidden = None if self._processes.rank == 0 else True
        with tqdm(total=total, desc="prepare", unit="sample", disable=hidden, smoothing=0.02) as bar:

            def advance(samples: int) -> None:
                bar.update(self._processes.count("samples", samples) - bar.n)

            for number in self._processes.shares("shards", len(plan.shards)):
                shard = plan.shards[number]
                old = complete_shard(self._folder / shard.folder, shard.number, shard.digest)
                # what was rejected may have been repaired since
                if old is not None and (self._options.skip_invalid or not old):
                    advance(shard.samples)
                else:
                    self._write_shard(plan, shard, advance)

    def _write_shard(self, plan: Plan, shard: PlannedShard, advance: Callable[[int], None]) -> None:
        first_key = shard.number * self._options.samples_per_shard
        folder, batch_size = self._folder / shard.folder, self._options.batch_size
        job = ShardJob(folder, shard.number, first_key, self._loaded(), batch_size, self._options.threads)
        try:
            job.run(plan.items(shard), shard.digest, advance)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory with --batch-size {batch_size}: the same command with a smaller one goes on"
            ) from error

    def _write_empty(self, plan: Plan) -> None:
        for folder in {self._folder / shard.folder for shard in plan.shards}:
            if not (folder / EMPTY_FILE).is_file():
                text, pooled = self._loaded().encode_prompts([""])
                # not save_file: what that writes only its owner can read, whatever the umask
                write_bytes(folder / EMPTY_FILE, save({"text": text[0].cpu(), "pooled": pooled[0].cpu()}))

    def _loaded(self) -> Encoders:
        if self._encoders is None:
            self._encoders = Encoders.from_pipeline(
                self._pipeline_dir,
                distributed.device(),
                DTYPES[self._options.dtype],
                self._facts.max_sequence_length,
            )
        return self._encoders

    def _finish(self) -> None:
        plan = Plan.read(self._folder / SURVEY_FOLDER)
        finish(self._folder, plan, self._info, self._settings, self._options.skip_invalid)
        self._tidy(plan)

    def _tidy(self, plan: Plan) -> None:
        """Remove what a finished folder needs no longer."""
        plan.remove()
        self._survey.remove_list()
        shutil.rmtree(self._folder / FETCHED_FOLDER, ignore_errors=True)

    def _result(self) -> Prepared:
        info = DatasetInfo.from_json(read_dataset_file(self._folder), self._folder / DATASET_FILE)
        rejects = read_rejects(self._folder)
        return Prepared(folder=self._folder, samples=info.samples, buckets=info.buckets, rejects=rejects)
