"""The loader on several ranks: the same global batches at every layout, and all ranks go on or stop together."""

import os
import signal
from pathlib import Path

import pytest
import torch
from data_fixtures import make_samples, make_shards
from multirank import run_ranks
from PIL import Image
from test_loader import damage

from soar_mega import distributed
from soar_mega.config import DataConfig, ParallelConfig
from soar_mega.data.info import DataError
from soar_mega.data.loader import Loader

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
BATCH, STEPS = 4, 4


def start(tensor, pipeline, context=1):
    distributed.start_world(
        ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
        )
    )


def open_loader(path, workers=0):
    return Loader(DataConfig(path=path, num_workers=workers, max_failed_share=0.5), 42, BATCH)


def read_batches(path, tensor, pipeline, context=1, workers=0):
    """(data rank, first stage, last stage, batches as dicts of tensors)"""
    start(tensor, pipeline, context)
    loader = open_loader(path, workers)
    names = ("position", "valid", "latents", "text", "pooled", "empty_text", "empty_pooled")
    batches = [{name: getattr(batch, name) for name in names} for batch, _ in zip(loader, range(STEPS))]  # noqa: B905
    loader.close()
    return distributed.data_rank(), distributed.is_first_stage(), distributed.is_last_stage(), batches


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards", make_samples(12))


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "context"), [(4, 2, 2, 1), (3, 1, 3, 1), (4, 1, 2, 1), (4, 1, 1, 2)]
)
def test_global_batches_are_the_same_at_every_layout(shards, world, tensor, pipeline, context):
    whole = [batch for batch, _ in zip(open_loader(str(shards)), range(STEPS))]  # noqa: B905
    replicas = world // (tensor * pipeline * context)
    share = BATCH // replicas
    for data_rank, first, last, batches in run_ranks(
        read_batches, world, str(shards), tensor, pipeline, context, 1 if world == 4 else 0, timeout=120
    ):
        rows = slice(data_rank * share, (data_rank + 1) * share)
        for got, expected in zip(batches, whole, strict=True):
            assert torch.equal(got["position"], expected.position[rows]) and got["valid"].all()
            _check(got["latents"], expected.latents[rows], first or last)
            _check(got["text"], expected.text[rows], first)
            _check(got["pooled"], expected.pooled[rows], first)
            _check(got["empty_text"], expected.empty_text, first)
            _check(got["empty_pooled"], expected.empty_pooled, first)


def _check(got, expected, present):
    assert torch.equal(got, expected) if present else got is None


def test_a_sample_that_one_stage_cannot_read_is_invalid_on_all(shards):
    """The last stage never reads text, so only the first one meets the damage."""
    damage(shards, {4, 7}, part="text")
    alone = [batch.valid for batch, _ in zip(open_loader(str(shards)), range(STEPS))]  # noqa: B905
    assert not torch.cat(alone).all()
    for _, _, _, batches in run_ranks(read_batches, 3, str(shards), 1, 3, timeout=120):
        assert all(torch.equal(got["valid"], expected) for got, expected in zip(batches, alone, strict=True))


def read_until_it_stops(path, kill_rank):
    start(1, 1)
    rank = torch.distributed.get_rank()
    loader = open_loader(path, workers=1)
    try:
        for step, _ in enumerate(loader):
            if step == 1 and rank == kill_rank:
                os.kill(loader._readers.processes[0].pid, signal.SIGKILL)
            assert step < 20
    except DataError as error:
        loader.close()
        return str(error)
    return None


def test_a_reader_killed_on_one_rank_stops_all_ranks_with_its_message(shards):
    messages = run_ranks(read_until_it_stops, 2, str(shards), 1, timeout=60)
    assert messages[0] == messages[1]
    assert "killed by signal 9" in messages[0] and messages[0].endswith(" (rank 1)")


def open_what_one_rank_lacks(path):
    start(1, 1)
    mine = path if torch.distributed.get_rank() == 0 else f"{path}-nowhere"
    try:
        open_loader(mine)
    except DataError as error:
        return str(error)
    return None


def test_a_data_set_that_one_rank_cannot_see_stops_all_ranks(shards):
    messages = run_ranks(open_what_one_rank_lacks, 2, str(shards), timeout=60)
    assert messages[0] == messages[1] and "nowhere does not exist" in messages[0]


def uneven(path):
    start(1, 1)
    try:
        Loader(DataConfig(path=path), 42, 3)
    except ValueError as error:
        return str(error)
    return None


def test_a_batch_that_does_not_divide_among_the_replicas_is_refused(shards):
    for message in run_ranks(uneven, 2, str(shards), timeout=60):
        assert "train.global_batch_size (3) must be a multiple of the 2" in message


def read_online(folder):
    start(1, 2)
    loader = Loader(DataConfig(path=folder, encode="online"), 42, 2, pipeline_dir=str(BASE))
    batch = next(loader)
    return batch.latents, batch.text


def test_encoding_while_training_serves_the_first_and_the_last_stage(tmp_path):
    for index in range(2):
        Image.new("RGB", (16, 16), (index * 200, 30, 90)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"a red {index}")
    (first, text), (last, no_text) = run_ranks(read_online, 2, str(tmp_path), timeout=120)
    assert torch.equal(first, last) and first.shape == (2, 4, 8, 8) and not torch.equal(first[0], first[1])
    assert text.shape == (2, 20, 64) and no_text is None
