"""The loader: an endless iterator of batches, the same samples at every layout and after every resume."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from soar_mega import distributed
from soar_mega.config import DataConfig
from soar_mega.config_checks import check_replicas
from soar_mega.data.batch import Batch
from soar_mega.data.compatibility import ModelSizes, check_compatible
from soar_mega.data.info import DataError, DatasetInfo
from soar_mega.data.order import Order, Place, Stretch
from soar_mega.data.ranks import Ranks, agree, this_rank
from soar_mega.data.readers import Readers
from soar_mega.data.shards import Read, find_shards

log = logging.getLogger(__name__)

NAMED = 5  # failed samples named in an error message


class Source(Protocol):
    """Where samples come from: shards, or images that are encoded while training."""

    info: DatasetInfo

    def open(self) -> None:
        """Make ready for reading; called on ranks that read."""

    def members(self, bucket: str) -> NDArray[Any]:
        """Indices of a bucket's samples."""

    def read(self, bucket: str, indices: Any, positions: Tensor, seed: int, text: bool) -> Read:
        """The samples as they are on disk; may run in another process."""

    def finish(self, read: Read, positions: Tensor, seed: int, text: bool) -> Read:
        """What `read` left to do, in this process: latents, and text and pooled where `text`."""

    def empty_prompt(self) -> tuple[Tensor, Tensor]:
        """text [S, D] and pooled [P] of the empty prompt."""


class Loader:
    """Yields this rank's share of each global batch: tensors on its device, positions and validity on the CPU.

    Building it, each `next` and nothing else are collective over the world. What stops one rank stops all of them, with
    the same DataError. Samples that any rank failed to read are not valid on all ranks.

    Args:
        data: where the samples come from.
        seed: train.seed; keys the order and the draws of the latents.
        global_batch_size: samples per step over all ranks.
        pipeline_dir: the diffusers folder that the run trains; its encoders must be those of the shards. "" skips that.
        sizes: the transformer's sizes; None reads them from `pipeline`.

    Raises:
        DataError: the data set is missing, damaged, of another format or from other encoders.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        global_batch_size: int,
        *,
        pipeline_dir: str = "",
        sizes: ModelSizes | None = None,
    ) -> None:
        self.ranks: Ranks = this_rank()
        self.seed = seed
        self.global_batch_size = global_batch_size
        self._max_failed_share = data.max_failed_share
        failure = None
        try:
            check_replicas(global_batch_size, self.ranks.data_size)
            self._source = _open_source(data, pipeline_dir, self.ranks)
            check_compatible(self._source.info, data.path, pipeline_dir, sizes)
            self._order = Order(seed, self._source.info.buckets)
            empty = self._source.empty_prompt() if self.ranks.leader and self.ranks.first_stage else None
        except (ValueError, OSError) as error:
            failure = str(error)
        agree({}, 0, failure)
        self.info = self._source.info
        self._empty = self._share_empty(empty) if self.ranks.first_stage else None
        self._place, self._failed = Place(), 0
        self._workers = data.num_workers
        self._readers = self._start_readers()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        stretch, place = self._order.step(self._place, self.global_batch_size)
        part = stretch.part(self.ranks.data_rank, self.ranks.data_size)
        read, fatal = self._take(part)
        first = part.position - stretch.position
        mine = {first + row: f"{read.names[row]}: {why}" for row, why in read.failures.items()}
        failed, reasons = agree(mine, self.global_batch_size, fatal)
        self._place, self._indices = place, read.indices
        if reasons:
            self._count_failures(reasons)
        return self._batch(part, read, ~failed[first : first + part.count])

    @property
    def consumed_samples(self) -> int:
        """Samples of the whole run so far, over all ranks."""
        return self._place.consumed

    def indices(self) -> list[int]:
        """Places in the data set of this rank's samples of the last batch; on ranks that read."""
        return [int(index) for index in self._indices]

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on behind the last batch; plain numbers, equal on all ranks."""
        return {
            "consumed_samples": self._place.consumed,
            "buckets": dict(self._place.streams),
            "bucket_sizes": dict(self._order.sizes),
            "seed": self.seed,
            "failed_samples": self._failed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, at any layout and batch size; ValueError for another data set or seed."""
        if "bucket_sizes" not in state:
            raise ValueError(
                "the run drew its own samples, and this recipe learns from data.path: start a new run from the weights "
                "(checkpoint.load and checkpoint.finetune=true)"
            )
        sizes = dict(state["bucket_sizes"])
        if sizes != self._order.sizes:
            raise ValueError(
                f"the run was reading a data set with buckets {sizes}, this one has {self._order.sizes}: give the same "
                "data.path, or start a new run from the weights (checkpoint.load and checkpoint.finetune=true)"
            )
        if state["seed"] != self.seed:
            raise ValueError(
                f"the run was started with train.seed={state['seed']}, not {self.seed}: keep it to resume"
            )
        self._place = Place(consumed=int(state["consumed_samples"]), streams=dict(state["buckets"]))
        self._failed = int(state["failed_samples"])
        self.close()
        self._readers = self._start_readers()

    def close(self) -> None:
        """End the reader processes."""
        if self._readers is not None:
            self._readers.close()

    def _start_readers(self) -> Readers | None:
        """From where the run is; None on ranks that do not read."""
        if not self.ranks.reads:
            return None
        is_gpu = distributed.device().type == "cuda"
        return Readers(self._read, self._stretches(self._place), self._workers, pin_memory=is_gpu)

    def _stretches(self, place: Place) -> Iterator[Stretch]:
        """Those of the run behind `place`, without end."""
        while True:
            stretch, place = self._order.step(place, self.global_batch_size)
            yield stretch

    def _read(self, stretch: Stretch) -> Read:
        """Runs in a reader process, which alone makes the permutations of epochs: of many samples they take long."""
        part = stretch.part(self.ranks.data_rank, self.ranks.data_size)
        indices = self._source.members(part.bucket)[self._order.members(part)]
        return self._source.read(
            part.bucket, indices, part.positions(), self.seed, text=self.ranks.first_stage
        )

    def _take(self, part: Stretch) -> tuple[Read, str | None]:
        """This rank's samples, or why it cannot go on."""
        nothing = Read(tensors={}, names=[])
        if self._readers is None:
            return nothing, None
        try:
            read = next(self._readers)
            positions, text = part.positions(), self.ranks.first_stage
            return self._source.finish(read, positions, self.seed, text), None
        except (ValueError, OSError, RuntimeError) as error:
            return nothing, str(error)

    def _count_failures(self, reasons: list[str]) -> None:
        if distributed.is_rank_zero():
            for reason in reasons:
                log.warning("sample left out: %s", reason)
        self._failed += len(reasons)
        # Early in a run one bad sample would be a large share: never divide by less than one epoch.
        share = self._failed / max(self._place.consumed, self.info.samples)
        if share > self._max_failed_share:
            more = f" and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
            raise DataError(
                f"{self._failed} samples could not be read, {share:.2%} of the data (data.max_failed_share="
                f"{self._max_failed_share}). Last ones: {'; '.join(reasons[:NAMED])}{more}"
            )

    def _batch(self, part: Stretch, read: Read, valid: Tensor) -> Batch:
        info, ranks = self.info, self.ranks
        batch = Batch(
            seed=self.seed,
            position=part.positions(),
            valid=valid,
            latent_shape=info.latent_shape(part.bucket),
            text_length=info.text_shape[0],
            names=read.names,
        )
        if ranks.first_stage or ranks.last_stage:
            shape = (part.count, *batch.latent_shape)
            batch.latents = ranks.share(read.tensors.get("latents"), shape, torch.float32)
        if ranks.first_stage:
            dtype = info.torch_text_dtype()
            batch.text = ranks.share(read.tensors.get("text"), (part.count, *info.text_shape), dtype)
            batch.pooled = ranks.share(read.tensors.get("pooled"), (part.count, info.pooled_size), dtype)
            assert self._empty is not None
            batch.empty_text, batch.empty_pooled = self._empty
        return batch

    def _share_empty(self, empty: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        text, pooled = empty if empty is not None else (None, None)
        dtype = self.info.torch_text_dtype()
        return (
            self.ranks.share(text, self.info.text_shape, dtype),
            self.ranks.share(pooled, (self.info.pooled_size,), dtype),
        )


def _open_source(data: DataConfig, pipeline_dir: str, ranks: Ranks) -> Source:
    source: Source
    if data.encode == "online":
        # The encoders' libraries are heavy and only needed here.
        from soar_mega.data.online import OnlineImages

        source = OnlineImages(data.path, pipeline_dir, text=ranks.first_stage)
    else:
        source = find_shards(data.path, data.cache_dir, data.cache_gb)
    if ranks.reads:
        source.open()
    return source
