"""One file of tensors per rank, in megatron's torch_dist format, hashed while it is written.

megatron's own writer starts processes even for a synchronous save, and waits for ever when one of them is killed.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from soar_mega.checkpoints.manifest import Facts
from soar_mega.engines.saved_pieces import SavedPiece, UnreadTensor
from soar_mega.private_names import with_sharded_keys, wrapped_exception, write_item


@dataclass
class Written:
    """What a rank has written."""

    results: list[WriteResult] = field(default_factory=list)  # where each tensor lies, for torch's .metadata
    files: dict[str, Facts] = field(default_factory=dict)


class RankFile(FileSystemWriterAsync):
    """Holds this rank's part of one checkpoint on the CPU, and writes it."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Copies what is on a GPU; what is on the CPU is not copied."""
        self._name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        self._items = [(item, _on_cpu(planner.resolve_data(item))) for item in plan.items]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._outcome: Any = None  # what was written, or the exception as torch sends it to others

    def write(self) -> Written:
        """Writes the file and makes it durable. Needs no other rank, and may run in another process.

        Raises:
            OSError: a full disk, for instance.
        """
        if not self._items:
            return Written()
        with open(Path(self.path) / self._name, "wb") as file:
            hashed = _HashedFile(file)
            try:
                results = [self._write_item(hashed, item, data) for item, data in self._items]
            except RuntimeError:
                if hashed.failure is not None:  # torch.save turns it into an error about a zip archive
                    raise hashed.failure from None
                raise
            file.flush()
            os.fsync(file.fileno())
            facts: Facts = {"size": file.tell(), "sha256": hashed.digest.hexdigest()}
        return Written(results, {self._name: facts})

    def _write_item(self, file: Any, item: WriteItem, data: Any) -> WriteResult:
        if callable(data):
            data = data()
        if isinstance(data, Tensor) and data.untyped_storage().nbytes() != data.numel() * data.element_size():
            data = data.clone()  # torch.save writes whole storages
        return write_item(self, file, data, item, self._name)

    def finish_write(self, outcome: Written | Exception) -> None:
        """Hands over what `write` has returned or raised, and lets go of the tensors."""
        self._outcome = wrapped_exception(outcome) if isinstance(outcome, Exception) else outcome
        self._items = []

    @property
    def files(self) -> dict[str, Facts]:
        """Size and hash of what this rank has written, by name."""
        return self._outcome.files if isinstance(self._outcome, Written) else {}

    def retrieve_write_results(self) -> Any:
        assert self._outcome is not None
        return self._outcome.results if isinstance(self._outcome, Written) else self._outcome


class RankFiles(TorchDistSaveShardedStrategy):
    """Plans a save for dist_checkpointing and leaves the writing to the caller: this rank's part is in `file`."""

    file: RankFile

    def __init__(self, pieces: Sequence[SavedPiece | UnreadTensor] = ()) -> None:
        super().__init__("torch_dist", 1)
        self._pieces = pieces

    def async_save(
        self, sharded_state_dict: Any, checkpoint_dir: str | Path, async_strategy: str = "mcore"
    ) -> AsyncRequest:
        self.file = RankFile(checkpoint_dir)
        planner = _Planner(self._pieces)
        plan, *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(with_sharded_keys(sharded_state_dict), False), self.file, planner=planner
        )
        return AsyncRequest(None, (), [lambda: save_state_dict_async_finalize(*plan)])


def save_tensors(state: dict[str, Any], folder: str | Path) -> None:
    """Writes an engine's sharded_state_dict into an empty folder, without the rest of a checkpoint. Collective."""
    file, finalize = plan_save(state, folder)
    file.finish_write(file.write())
    for step in finalize:
        step()


def plan_save(state: dict[str, Any], folder: str | Path) -> tuple[RankFile, list[Callable[[], None]]]:
    """This rank's file, ready to be written, and what all ranks call when all have written. Collective."""
    plan = RankFiles(state.pop("pieces", ()))
    request = dist_checkpointing.save(
        state,
        str(folder),
        sharded_strategy=plan,
        async_sharded_save=True,
        validate_access_integrity=False,  # torch's plan finds gaps and overlaps, in pieces too
    )
    return plan.file, request.finalize_fns


class _Planner(MCoreSavePlanner):
    """Adds this rank's pieces, box by box, to what megatron has it write."""

    def __init__(self, pieces: Sequence[SavedPiece | UnreadTensor]) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._boxes: dict[MetadataIndex, Tensor] = {}
        self._unread: dict[MetadataIndex, Callable[[], Tensor]] = {}
        self._items: list[WriteItem] = []
        for piece in pieces:
            if isinstance(piece, UnreadTensor):
                like = torch.empty(piece.shape, dtype=piece.dtype, device="meta")
                index = self._add(piece.key, (0,) * like.ndim, like, like.shape)
                self._unread[index] = piece.read
                continue
            for offset, box in piece.boxes():
                index = self._add(piece.key, offset, box, torch.Size(piece.shard.global_shape))
                self._boxes[index] = box

    def _add(self, key: str, offset: tuple[int, ...], box: Tensor, whole: torch.Size) -> MetadataIndex:
        index = MetadataIndex(key, torch.Size(offset))
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=torch.Size(offset), sizes=box.shape),
            properties=TensorProperties.create_from_tensor(box),
            size=whole,
        )
        self._items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        return index

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._unread.get(write_item.index) or super().resolve_data(write_item)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[*plan.items, *self._items])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._boxes[index] if index in self._boxes else super().lookup_object(index)


class _HashedFile:
    """Passes bytes on to a file and hashes them; what torch.save needs of a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None
        self.tell, self.flush = file.tell, file.flush

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise


def _on_cpu(data: Any) -> Any:
    """A tensor on the CPU, or bytes as they are."""
    return data.detach().to("cpu", non_blocking=True) if isinstance(data, Tensor) else data
