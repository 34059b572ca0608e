"""A rank that cannot read its part of a checkpoint ends the load on all, before anything of it is used."""

import errno
import itertools
from pathlib import Path

import pytest
import torch
from multirank import run_ranks
from stand_in import Weights, load, save

from soar_mega import distributed
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import ParallelConfig
from soar_mega.faults.agreement import PeerFailure

# which of the reads fails: first on its own, then in the load, then the tensors'
COMMON_STATE, A_TENSOR = 1, 4


def with_a_failure_on_rank_1(folder: Path, failing: int) -> tuple[type, str]:
    import torch.distributed as dist

    distributed.start_world(ParallelConfig())
    save(RunFolder(folder), 1)
    if dist.get_rank() == 1:
        reads, read = itertools.count(1), torch.load

        def failing_read(*args, **kwargs):
            if next(reads) == failing:
                raise OSError(errno.EIO, "Input/output error")
            return read(*args, **kwargs)

        torch.load = failing_read
    with pytest.raises((ValueError, PeerFailure)) as failure:
        load(RunFolder(folder))
    assert Weights().current.tolist() == [0.0] * 4
    return type(failure.value), str(failure.value)


@pytest.mark.parametrize("failing", [COMMON_STATE, A_TENSOR], ids=["common-state", "tensor"])
def test_all_ranks_stop_where_one_cannot_read(tmp_path: Path, failing: int) -> None:
    (zero, said), (one, also_said) = run_ranks(with_a_failure_on_rank_1, 2, tmp_path, failing, timeout=60)
    assert (zero, one) == (ValueError, PeerFailure)
    assert said == also_said
    assert said.startswith(f"{tmp_path}/iter_0000001: this checkpoint cannot be read (rank 1: ")
    assert "Input/output error" in said
