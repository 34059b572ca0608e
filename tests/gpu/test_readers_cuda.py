"""Batches on their way to a GPU: pinned by a thread of the run, copied without a wait, and in no graph's way."""

import os
import signal
from pathlib import Path

import pytest
import torch
from data_fixtures import make_sample, make_shards

from soar_mega.config import DataConfig
from soar_mega.data.info import DataError
from soar_mega.data.loader import Loader
from soar_mega.data.readers import Readers
from soar_mega.data.shards import open_shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    samples = [make_sample(i) for i in range(12)]
    for sample in samples:
        sample.latent_std.fill_(0.5)
    return make_shards(tmp_path / "shards", samples)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_reach_the_device_pinned_and_without_a_wait(shards: Path, workers: int) -> None:
    loader = Loader(DataConfig(path=str(shards), num_workers=workers), 42, 4)
    assert isinstance(loader._readers, Readers)
    read = next(loader._readers)
    assert all(values.is_pinned() for values in read.tensors.values())
    loader.load_state_dict(loader.state_dict())
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            batch = next(loader)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = open_shards(shards).read("16x16", loader.indices(), batch.position, 42)
        for name, values in expected.tensors.items():
            found = getattr(batch, name)
            assert found.is_cuda and torch.equal(found.cpu(), values)
    loader.close()


def test_graphs_are_captured_while_batches_are_pinned(shards: Path) -> None:
    loader = Loader(DataConfig(path=str(shards), num_workers=2), 42, 4)
    total = torch.zeros((), device="cuda")
    for _ in range(20):
        batch = next(loader)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")  # as layers are captured
            assert batch.latents is not None
            total += batch.latents.sum()
            graph.capture_end()
        graph.replay()
        torch.cuda.synchronize()
    assert total.isfinite()
    loader.close()


def test_a_killed_reader_stops_a_run_that_pins(shards: Path) -> None:
    loader = Loader(DataConfig(path=str(shards), num_workers=1), 42, 4)
    next(loader)
    assert loader._readers is not None
    os.kill(loader._readers.processes[0].pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match="was killed by signal 9"):
        for _ in range(20):
            next(loader)
    loader.close()
