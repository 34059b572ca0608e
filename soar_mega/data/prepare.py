"""Captioned images to shards of latents and embeddings: the work of `soar-mega prepare`.

The first process lists the sources; all look at the images; the first one settles what is encoded into which shard; all
write shards, each the next that nobody has begun; the first one finishes. What a shard holds depends on the sources and
the settings alone, so a prepare that was interrupted goes on behind its complete shards with any number of processes.
dataset.json comes last, and only when rejects are allowed or there are none.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

from soar_mega import distributed
from soar_mega.data import prepare_folder
from soar_mega.data.buckets import check_buckets, generate_buckets
from soar_mega.data.encoder_facts import EncoderFacts, encoder_facts
from soar_mega.data.encoders import Encoders
from soar_mega.data.fetched import copy_of, expand, fetch, is_copied, is_remote
from soar_mega.data.fingerprints import fingerprints
from soar_mega.data.image_sources import list_items
from soar_mega.data.info import DatasetInfo
from soar_mega.data.items import Item, Reject
from soar_mega.data.json_files import read_json, write_bytes
from soar_mega.data.plan import Plan, PlannedShard
from soar_mega.data.prepare_folder import (
    FETCHED_FOLDER,
    HELD_OUT_FOLDER,
    SURVEY_FOLDER,
    Lock,
    complete_shard,
    index_file,
)
from soar_mega.data.processes import Processes
from soar_mega.data.rejects import (
    REJECTS_FILE,
    read_rejects,
    rejects_of,
    table,
    write_duplicates,
    write_rejects,
)
from soar_mega.data.selection import Selection, Wishes
from soar_mega.data.shard_job import ShardJob
from soar_mega.data.shard_writer import (
    DATASET_FILE,
    EMPTY_FILE,
    FORMAT_VERSION,
    write_dataset_file,
)
from soar_mega.data.shards import read_dataset_file
from soar_mega.data.survey import Survey
from soar_mega.outputs import refuse_overlap

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    *,
    images: str | Path | None = None,
    buckets: Sequence[str] = (),
    resolution: int | None = None,
    wishes: Wishes | None = None,
    score_key: str = "score",
    skip_invalid: bool = False,
    max_sequence_length: int | None = None,
    dtype: str = "fp32",
    batch_size: int = 8,
    samples_per_shard: int = 1000,
    threads: int = 4,
) -> Prepared:
    """Encode captioned images with the encoders of a pipeline into shards in `out`.

    The same call on an unfinished folder goes on where it stopped; on a finished one it does nothing. Collective over
    the processes that torchrun's environment names, which share the folder.

    Args:
        sources, images, score_key: see `image_sources.list_items`; several sources are taken one after the other.
        buckets: sizes "WIDTHxHEIGHT" to choose from; empty generates them from `resolution`, the edge of the square one
            (None: the transformer's own sample size). A size that the source gives is taken as it is.
        wishes: which images are taken, held out for validation (in `out`/held_out) and mirrored.
        skip_invalid: finish without the samples that cannot be used, instead of failing.
        max_sequence_length: T5 tokens; None takes the smaller of 256 and what the T5 tokenizer allows.
        dtype: fp32 | bf16, of the text encoders and their embeddings.
        batch_size: images per forward of the encoders. It may change between calls; latents differ by rounding then.
        threads: of each process, that read and decode images.

    Raises:
        ValueError: bad arguments, a folder made with others or by others, one that the source lies in or around, or
            samples that cannot be used, by name.
    """
    processes = Processes()
    try:
        preparation = processes.together(
            lambda: _Preparation(
                processes=processes,
                sources=expand([str(s) for s in ([sources] if isinstance(sources, str | Path) else sources)]),
                folder=Path(out),
                pipeline_dir=Path(pipeline_dir),
                images=Path(images) if images is not None else None,
                buckets=buckets,
                resolution=resolution,
                wishes=wishes or Wishes(),
                score_key=score_key,
                skip_invalid=skip_invalid,
                max_sequence_length=max_sequence_length,
                dtype=dtype,
                batch_size=batch_size,
                samples_per_shard=samples_per_shard,
                threads=threads,
            )
        )
        return preparation.run()
    finally:
        processes.close()


@dataclass(kw_only=True)
class _Preparation:
    processes: Processes
    sources: list[str]
    folder: Path
    pipeline_dir: Path
    images: Path | None
    buckets: Sequence[str]
    resolution: int | None
    wishes: Wishes
    score_key: str
    skip_invalid: bool
    max_sequence_length: int | None
    dtype: str
    batch_size: int
    samples_per_shard: int
    threads: int

    def __post_init__(self) -> None:
        self._check()
        self._facts = encoder_facts(self.pipeline_dir, self.max_sequence_length)
        self._buckets = _bucket_choice(self.buckets, self.resolution, self._facts)
        self._settings = {
            "format_version": FORMAT_VERSION,
            "encoders": fingerprints(self.pipeline_dir),
            "buckets": self._buckets,
            **asdict(self.wishes),
            "score_key": self.score_key,
            "max_sequence_length": self._facts.max_sequence_length,
            "dtype": self.dtype,
            "samples_per_shard": self.samples_per_shard,
        }
        self._parts = 0
        self._survey = Survey(self.folder / SURVEY_FOLDER)
        self._listed_rejects: list[Reject] = []
        self._encoders: Encoders | None = None

    def _check(self) -> None:
        local = [source for source in self.sources if not is_remote(source)]
        inputs: dict[str, str | Path] = {"the folder of images": self.images or ""}
        for source in local:
            inputs["the source" if len(local) == 1 else f"the source {source}"] = source
        refuse_overlap(self.folder, inputs | {"the pipeline": self.pipeline_dir})
        if missing := [source for source in local if not Path(source).exists()]:
            raise ValueError(f"there is no source {missing[0]}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for name in ("batch_size", "samples_per_shard", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution is {self.resolution}: it must be at least 1 pixel")
        self.wishes.check()

    def run(self) -> Prepared:
        """All steps; each begins when all processes are done with the one before."""
        processes = self.processes
        lock = processes.together(lambda: Lock(self.folder))
        try:
            processes.first_alone(lock.take)
            processes.together(lock.share)
            if processes.first_alone(self._begin):
                return processes.together(self._result)
            processes.together(self._fetch)
            parts = processes.first_alone(self._list)
            processes.together(lambda: self._look(parts))
            if processes.first_alone(self._settle):
                processes.together(self._encode)
                processes.first_alone(self._finish)
            return processes.together(self._result)
        finally:
            lock.close()

    def _begin(self) -> bool:
        """Whether the folder is finished and there is nothing on this machine to compare it with."""
        if not prepare_folder.is_finished(self.folder):
            prepare_folder.begin(self.folder, self._settings)
            return False
        values = read_dataset_file(self.folder)
        path = self.folder / DATASET_FILE
        if not isinstance(values.get("settings"), dict):
            raise ValueError(f"{path} names no settings: `soar-mega prepare` did not write it")
        prepare_folder.refuse_other_settings(self.folder, values["settings"], self._settings)
        remote = any(is_remote(source) for source in self.sources)
        if remote:
            log.info("%s is finished already; its remote sources are not looked at again", self.folder)
        return remote

    def _fetch(self) -> None:
        copied = [source for source in self.sources if is_copied(source)]
        for number in self.processes.shares("sources", len(copied)):
            fetch(copied[number], self._local(copied[number]))

    def _local(self, source: str) -> Path:
        return copy_of(source, self.folder / FETCHED_FOLDER) if is_copied(source) else Path(source)

    def _list(self) -> int:
        """Write down all items of the sources; how many parts these are to be looked at in."""
        listed: list[Item] = []
        for source in self.sources:
            items, rejects = list_items(self._local(source), self.images, self.score_key)
            if len(self.sources) > 1:
                items = [replace(item, name=f"{source}: {item.name}") for item in items]
                rejects = [replace(reject, name=f"{source}: {reject.name}") for reject in rejects]
            listed += items
            self._listed_rejects += rejects
        self._parts = self._survey.write_list(listed)
        return self._parts

    def _look(self, parts: int) -> None:
        for part in self.processes.shares("parts", parts):
            self._survey.look(part, self.threads)

    def _settle(self) -> int:
        """What goes where: how many shards; 0 for a finished folder, of which all is still the same."""
        survey = self._survey
        selection = Selection(self.wishes, self._buckets, self._facts)
        plan = Plan(folder=self.folder / SURVEY_FOLDER)
        for part in range(self._parts):
            pairs = list(zip(survey.items(part), survey.seen(part), strict=True))
            plan.source_samples += len(pairs)
            plan.add(selection.choose(pairs), self.samples_per_shard)
        plan.source_samples += len(self._listed_rejects)
        plan.finish()
        if prepare_folder.is_finished(self.folder):
            plan.remove()
            self._survey.remove_list()
            shutil.rmtree(self.folder / FETCHED_FOLDER, ignore_errors=True)
            if read_dataset_file(self.folder).get("digests") != [shard.digest for shard in plan.of("")]:
                raise ValueError(
                    f"{self.folder} was made of other images or captions: remove it or give another folder"
                )
            log.info("%s is finished already", self.folder)
            return 0
        rejects = self._listed_rejects + selection.rejects
        write_duplicates(self.folder, selection.duplicates, self.wishes.drop_duplicates)
        write_rejects(self.folder, rejects, plan.source_samples, self.skip_invalid)
        if not plan.of(""):
            raise ValueError(
                f"none of the {plan.source_samples} samples can be used (see {self.folder / REJECTS_FILE})"
            )
        if self.wishes.held_out_share is not None and not plan.of(HELD_OUT_FOLDER):
            raise ValueError(
                f"held_out_share {self.wishes.held_out_share} of {plan.source_samples} samples holds none: give a "
                "larger one"
            )
        for shard in plan.shards:
            (self.folder / shard.folder).mkdir(exist_ok=True)
        return len(plan.shards)

    def _encode(self) -> None:
        """Write shards that are not there yet."""
        plan = Plan.read(self.folder / SURVEY_FOLDER)
        if self.processes.rank == 0:
            self._write_empty(plan)
        total = sum(shard.samples for shard in plan.shards)
        # disable=None: silent when nobody looks
        hidden = None if self.processes.rank == 0 else True
        with tqdm(total=total, desc="prepare", unit="sample", disable=hidden, smoothing=0.02) as bar:

            def advance(samples: int) -> None:
                bar.update(self.processes.count("samples", samples) - bar.n)

            for number in self.processes.shares("shards", len(plan.shards)):
                shard = plan.shards[number]
                old = complete_shard(self.folder / shard.folder, shard.number, shard.digest)
                # what was rejected may have been repaired since
                if old is not None and (self.skip_invalid or not old):
                    advance(shard.samples)
                else:
                    self._write_shard(plan, shard, advance)

    def _write_shard(self, plan: Plan, shard: PlannedShard, advance: Callable[[int], None]) -> None:
        first_key = shard.number * self.samples_per_shard
        folder = self.folder / shard.folder
        job = ShardJob(folder, shard.number, first_key, self._loaded(), self.batch_size, self.threads)
        try:
            job.run(plan.items(shard), advance)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory with --batch-size {self.batch_size}: the same command with a smaller one goes on"
            ) from error

    def _write_empty(self, plan: Plan) -> None:
        for folder in {self.folder / shard.folder for shard in plan.shards}:
            if not (folder / EMPTY_FILE).is_file():
                text, pooled = self._loaded().encode_prompts([""])
                # not save_file: what that writes only its owner can read, whatever the umask
                write_bytes(folder / EMPTY_FILE, save({"text": text[0].cpu(), "pooled": pooled[0].cpu()}))

    def _loaded(self) -> Encoders:
        if self._encoders is None:
            self._encoders = Encoders.from_pipeline(
                self.pipeline_dir, distributed.device(), DTYPES[self.dtype], self._facts.max_sequence_length
            )
        return self._encoders

    def _finish(self) -> int:
        """Judge all rejects, then write the dataset files, that of the training set last."""
        plan = Plan.read(self.folder / SURVEY_FOLDER)
        rejects = read_rejects(self.folder)
        for shard in plan.shards:
            path = index_file(self.folder / shard.folder, shard.number)
            rejects += rejects_of(read_json(path), path)
        write_rejects(self.folder, rejects, plan.source_samples, self.skip_invalid)
        for folder in (HELD_OUT_FOLDER, ""):
            if shards := plan.of(folder):
                self._finish_set(self.folder / folder, [shard.digest for shard in shards], len(rejects))
        for line in table(rejects):
            log.info("%s", line)
        plan.remove()
        self._survey.remove_list()
        shutil.rmtree(self.folder / FETCHED_FOLDER, ignore_errors=True)
        return 0

    def _finish_set(self, folder: Path, digests: list[str], rejected: int) -> None:
        buckets: Counter[str] = Counter()
        cut: Counter[str] = Counter()
        for number in range(len(digests)):
            index = read_json(index_file(folder, number))
            buckets.update(sample["bucket"] for sample in index["samples"])
            cut.update(index.get("captions_cut", {}))
        if not buckets:
            raise ValueError(f"none of the samples can be used (see {self.folder / REJECTS_FILE})")
        info = DatasetInfo(
            buckets=dict(buckets),
            latent_channels=self._facts.latent_channels,
            vae_scale_factor=self._facts.vae_scale_factor,
            text_shape=self._facts.text_shape,
            pooled_size=self._facts.pooled_size,
            max_sequence_length=self._facts.max_sequence_length,
            text_dtype=str(DTYPES[self.dtype]).removeprefix("torch."),
            encoders=fingerprints(self.pipeline_dir),
        )
        prepare_folder.remove_leftover_shards(folder, len(digests))
        write_dataset_file(
            folder,
            info,
            len(digests),
            settings=self._settings,
            digests=digests,
            rejected=rejected,
            captions_cut=dict(cut),
        )
        for part, count in cut.items():
            if count:
                log.warning(
                    "%d of %d captions are longer than %s takes and were cut", count, info.samples, part
                )
        log.info("%s: %d samples in %d shards, %d left out", folder, info.samples, len(digests), rejected)

    def _result(self) -> Prepared:
        info = DatasetInfo.from_json(read_dataset_file(self.folder), self.folder / DATASET_FILE)
        rejects = read_rejects(self.folder)
        return Prepared(folder=self.folder, samples=info.samples, buckets=info.buckets, rejects=rejects)


def _bucket_choice(buckets: Sequence[str], resolution: int | None, facts: EncoderFacts) -> list[str]:
    if buckets:
        return check_buckets(buckets, facts.size_multiple, facts.largest_side)
    return generate_buckets(resolution or facts.default_resolution, facts.size_multiple, facts.largest_side)
