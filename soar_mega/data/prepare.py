"""Captioned images to shards of latents and embeddings: the work of `soar-mega prepare`.

Shard k holds the k-th run of items of the source, so an interrupted run goes on behind its last complete shard and the
bytes do not depend on the interruption. dataset.json comes last, and only when rejects are allowed or there are none.
"""

import fcntl
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tqdm import tqdm

from soar_mega import distributed
from soar_mega.data.buckets import check_buckets, generate_buckets
from soar_mega.data.encoder_facts import EncoderFacts, encoder_facts
from soar_mega.data.encoders import Encoders
from soar_mega.data.fingerprints import fingerprints
from soar_mega.data.image_sources import Item, Reject, list_items
from soar_mega.data.info import DatasetInfo
from soar_mega.data.item_digests import images_changed, listing
from soar_mega.data.shard_job import ShardJob
from soar_mega.data.shard_writer import (
    DATASET_FILE,
    EMPTY_FILE,
    FORMAT_VERSION,
    shard_name,
    write_bytes,
    write_dataset_file,
    write_json,
)
from soar_mega.data.shards import read_dataset_file, read_index, read_json
from soar_mega.outputs import refuse_overlap

log = logging.getLogger(__name__)

SETTINGS_FILE = "prepare.json"  # written first: where it is, what is named here is this program's
LOCK_FILE = ".lock"
REJECTS_FILE = "rejects.jsonl"
NAMED = 5  # rejects named in a message
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a finished `prepare` made."""

    folder: Path
    samples: int
    buckets: dict[str, int]
    rejects: list[Reject]


def prepare(
    source: str | Path,
    out: str | Path,
    pipeline_dir: str | Path,
    *,
    images: str | Path | None = None,
    buckets: Sequence[str] = (),
    resolution: int | None = None,
    flip: bool = False,
    skip_invalid: bool = False,
    max_sequence_length: int | None = None,
    dtype: str = "fp32",
    batch_size: int = 8,
    samples_per_shard: int = 1000,
) -> Prepared:
    """Encode the captioned images of `source` with the encoders of `pipeline` into shards in `out`.

    The same call on an unfinished folder goes on where it stopped; on a finished one it does nothing.

    Args:
        source, images: see `sources.list_items`.
        buckets: sizes "WIDTHxHEIGHT" to choose from; empty generates them from `resolution`, the edge of the square one
            (None: the transformer's own sample size). A size that the source gives is taken as it is.
        flip: write each image mirrored too. Breaks captions that say left or right.
        skip_invalid: finish without the samples that cannot be used, instead of failing.
        max_sequence_length: T5 tokens; None takes the smaller of 256 and what the T5 tokenizer allows.
        dtype: fp32 | bf16, of the text encoders and their embeddings.
        batch_size: images per forward of the encoders.

    Raises:
        ValueError: bad arguments, a folder made with others or by others, one that the source lies in or around, or
            samples that cannot be used, by name.
    """
    folder, pipeline_dir = Path(out), Path(pipeline_dir)
    refuse_overlap(
        folder, {"the source": source, "the folder of images": images or "", "the pipeline": pipeline_dir}
    )
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if batch_size < 1 or samples_per_shard < 1:
        raise ValueError(
            f"batch_size ({batch_size}) and samples_per_shard ({samples_per_shard}) must be at least 1"
        )
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution is {resolution}: it must be at least 1 pixel")
    facts = encoder_facts(pipeline_dir, max_sequence_length)
    sizes = _bucket_choice(buckets, resolution, facts)
    items, listed_rejects = list_items(Path(source), Path(images) if images is not None else None)
    if flip:
        items = [variant for item in items for variant in (item, _mirrored(item))]
    chunks = [items[first : first + samples_per_shard] for first in range(0, len(items), samples_per_shard)]
    settings = {
        "format_version": FORMAT_VERSION,
        "encoders": fingerprints(pipeline_dir),
        "buckets": sizes,
        "flip": flip,
        "max_sequence_length": facts.max_sequence_length,
        "dtype": dtype,
        "batch_size": batch_size,
        "samples_per_shard": samples_per_shard,
    }
    digests = [listing(chunk) for chunk in chunks]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "a") as lock:
        _lock(lock, folder)
        if (folder / DATASET_FILE).is_file():
            return _already_finished(folder, settings, chunks, digests)
        _start(folder, settings)
        rejects = listed_rejects + _write_shards(
            folder, pipeline_dir, facts, chunks, digests, settings, skip_invalid
        )
        return _finish(
            folder, facts, settings, digests, rejects, len(items) + len(listed_rejects), skip_invalid
        )


def _bucket_choice(buckets: Sequence[str], resolution: int | None, facts: EncoderFacts) -> list[str]:
    if buckets:
        return check_buckets(buckets, facts.size_multiple, facts.largest_side)
    return generate_buckets(resolution or facts.default_resolution, facts.size_multiple, facts.largest_side)


def _mirrored(item: Item) -> Item:
    return Item(**{**asdict(item), "name": f"{item.name} (mirrored)", "mirrored": True})


def _lock(file: Any, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(
            f"another `soar-mega prepare` is writing {folder}: wait, or give another folder"
        ) from error


def _already_finished(
    folder: Path, settings: dict[str, Any], chunks: Sequence[Sequence[Item]], digests: list[str]
) -> Prepared:
    values = read_dataset_file(folder)
    if not isinstance(values.get("settings"), dict):
        raise ValueError(f"{folder / DATASET_FILE} names no settings: `soar-mega prepare` did not write it")
    _refuse_other_settings(folder, values["settings"], settings)
    if values.get("digests") != digests or any(
        images_changed(chunk, path := _index(folder, number), read_index(path).get("images", ""))
        for number, chunk in enumerate(chunks)
    ):
        raise ValueError(f"{folder} was made of other images or captions: remove it or give another folder")
    log.info("%s is finished already", folder)
    info = DatasetInfo.from_json(values, folder / DATASET_FILE)
    return Prepared(folder=folder, samples=info.samples, buckets=info.buckets, rejects=_read_rejects(folder))


def _start(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS_FILE
    if path.is_file():
        _refuse_other_settings(folder, read_json(path), settings)
    elif others := sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK_FILE):
        raise ValueError(
            f"{folder} holds {others[0]} but no {SETTINGS_FILE}: it is not a folder that this program began. Give "
            "another one"
        )
    write_json(path, settings)


def _refuse_other_settings(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in new.items():
        if old.get(name) != value:
            raise ValueError(
                f"{folder} was begun with {name} {old.get(name)}, not {value}: keep the settings, remove the folder or "
                "give another one"
            )


def _write_shards(
    folder: Path,
    pipeline_dir: Path,
    facts: EncoderFacts,
    chunks: Sequence[Sequence[Item]],
    digests: Sequence[str],
    settings: dict[str, Any],
    skip_invalid: bool,
) -> list[Reject]:
    """Write what is not there yet; the rejects of all shards, old and new."""
    rejects: list[Reject] = []
    encoders = None
    # disable=None: silent when nobody looks
    with tqdm(total=sum(map(len, chunks)), desc="prepare", unit="sample", disable=None) as progress:
        for number, (chunk, digest) in enumerate(zip(chunks, digests, strict=True)):
            old = _complete_shard(folder, number, chunk, digest)
            # Rejected samples may have been repaired since.
            if old is not None and (skip_invalid or not old):
                rejects += old
                progress.update(len(chunk))
                continue
            if encoders is None:
                device = distributed.device()
                dtype = DTYPES[settings["dtype"]]
                encoders = Encoders.from_pipeline(pipeline_dir, device, dtype, facts.max_sequence_length)
                text, pooled = encoders.encode_prompts([""])
                # not save_file: what that writes only its owner can read, whatever the umask
                write_bytes(folder / EMPTY_FILE, save({"text": text[0].cpu(), "pooled": pooled[0].cpu()}))
            first_key = number * settings["samples_per_shard"]
            rejects += ShardJob(folder, number, first_key, encoders, settings).run(chunk, digest, progress)
    return rejects


def _index(folder: Path, number: int) -> Path:
    return folder / f"{shard_name(number)}.json"


def _complete_shard(folder: Path, number: int, chunk: Sequence[Item], digest: str) -> list[Reject] | None:
    """The rejects of a shard that was completed from the same items; None when there is none."""
    tar, index = folder / f"{shard_name(number)}.tar", _index(folder, number)
    if not (tar.is_file() and index.is_file()):
        return None
    try:
        values = read_index(index)
        rejects = [_reject(row, index) for row in values.get("rejects", [None])]
    except ValueError as error:
        log.warning("%s: the shard is written again", error)
        return None
    if values.get("digest") != digest or tar.stat().st_size != values["bytes"]:
        return None
    if images_changed(chunk, index, values.get("images", "")):
        return None
    return rejects


def _reject(row: Any, path: Path) -> Reject:
    if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("name", "reason")):
        return Reject(name=row["name"], reason=row["reason"])
    raise ValueError(f"{path} holds {str(row)[:60]} where a rejected sample's name and reason belong")


def _finish(
    folder: Path,
    facts: EncoderFacts,
    settings: dict[str, Any],
    digests: list[str],
    rejects: list[Reject],
    total: int,
    skip_invalid: bool,
) -> Prepared:
    """Judge the rejects, then write dataset.json."""
    path = folder / REJECTS_FILE
    path.write_text("".join(json.dumps(asdict(reject)) + "\n" for reject in rejects))
    if rejects and not skip_invalid:
        named = "\n".join(f"  {reject.name}: {reject.reason}" for reject in rejects[:NAMED])
        more = f"\n  and {len(rejects) - NAMED} more" if len(rejects) > NAMED else ""
        raise ValueError(
            f"{len(rejects)} of {total} samples cannot be used (all are listed in {path}):\n{named}{more}\n"
            "Repair or remove them and run the same command again, or leave them out with --skip-invalid"
        )
    buckets: dict[str, int] = {}
    cut: dict[str, int] = {}
    for number in range(len(digests)):
        index = read_json(_index(folder, number))
        for sample in index["samples"]:
            buckets[sample["bucket"]] = buckets.get(sample["bucket"], 0) + 1
        for part, count in index.get("captions_cut", {}).items():
            cut[part] = cut.get(part, 0) + count
    if not buckets:
        raise ValueError(f"none of the {total} samples can be used (see {path})")
    info = DatasetInfo(
        buckets=buckets,
        latent_channels=facts.latent_channels,
        vae_scale_factor=facts.vae_scale_factor,
        text_shape=facts.text_shape,
        pooled_size=facts.pooled_size,
        max_sequence_length=facts.max_sequence_length,
        text_dtype=str(DTYPES[settings["dtype"]]).removeprefix("torch."),
        encoders=settings["encoders"],
    )
    _remove_leftover_shards(folder, len(digests))
    write_dataset_file(
        folder,
        info,
        len(digests),
        settings=settings,
        digests=digests,
        rejected=len(rejects),
        captions_cut=cut,
    )
    for part, count in cut.items():
        if count:
            log.warning("%d of %d captions are longer than %s takes and were cut", count, info.samples, part)
    log.info("%s: %d samples in %d shards, %d left out", folder, info.samples, len(digests), len(rejects))
    return Prepared(folder=folder, samples=info.samples, buckets=buckets, rejects=rejects)


def _remove_leftover_shards(folder: Path, count: int) -> None:
    """Those behind the last one: the folder was begun with more images."""
    for path in sorted(folder.iterdir()):
        name = re.fullmatch(r"shard-(\d{6,})\.(tar|json)(\.tmp)?", path.name)
        if name and int(name[1]) >= count:
            log.info("%s is left over from a larger source and is removed", path)
            path.unlink()


def _read_rejects(folder: Path) -> list[Reject]:
    path = folder / REJECTS_FILE
    try:
        lines = path.read_text().splitlines() if path.is_file() else []
        return [_reject(json.loads(line), path) for line in lines]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: remove it ({error})") from error
