"""Layouts that are not possible are refused with one that is; starting a world twice is harmless."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from multirank import RankFailure, run_ranks

from soar_mega import distributed
from soar_mega.config import ParallelConfig
from soar_mega.distributed import check_layout, start_world, stop_world


@pytest.mark.parametrize("layout", [(8, 2, 2), (8, 1, 8), (1, 1, 1), (6, 3, 1), (8, 1, 2, 4)])
def test_possible_layouts(layout):
    check_layout(*layout)


@pytest.mark.parametrize(
    "layout, advice",
    [
        (
            (4, 3, 1),
            r"tensor_model_parallel_size=[24] .*pipeline_model_parallel_size=1 .*; or start 3 processes",
        ),
        (
            (2, 2, 2),
            r"tensor_model_parallel_size=2 .*pipeline_model_parallel_size=1 .*; or start 4 processes",
        ),
        (
            (1, 1, 4),
            r"tensor_model_parallel_size=1 .*pipeline_model_parallel_size=1 .*; or start 4 processes",
        ),
        (
            (4, 2, 1, 4),
            r"tensor_model_parallel_size=1 .*pipeline_model_parallel_size=1 .*context_parallel_size=4; or start 8",
        ),
        ((8, 0, 1), "must be at least 1"),
    ],
)
def test_impossible_layouts_come_with_advice(layout, advice):
    with pytest.raises(ValueError, match=advice):
        check_layout(*layout)


def test_a_world_of_one_starts_in_a_plain_process_and_only_once():
    start_world(ParallelConfig())
    group = dist.group.WORLD
    start_world(ParallelConfig())
    assert dist.group.WORLD is group and dist.get_world_size() == 1
    assert distributed.is_first_stage() and distributed.is_last_stage() and distributed.is_rank_zero()
    assert (distributed.data_rank(), distributed.data_size()) == (0, 1)
    with pytest.raises(ValueError, match="already runs with TP x PP x CP x VPP = 1 x 1 x 1 x 1"):
        start_world(ParallelConfig(tensor_model_parallel_size=2))
    stop_world()
    assert not dist.is_initialized()
    stop_world()


def test_all_groups_and_the_store_wait_as_long_as_is_asked():
    stop_world()
    start_world(ParallelConfig(), timeout=timedelta(minutes=123))
    groups = list(dist.distributed_c10d._world.pg_map)
    options = [group._get_backend(torch.device("cpu")).options for group in groups]
    assert len(groups) > 5
    # newer torch counts off the time that making a group took
    assert {round(option._timeout / timedelta(minutes=123), 4) for option in options} == {1.0}
    assert dist.distributed_c10d._get_default_store().timeout == timedelta(minutes=123)
    stop_world()


def test_on_gpus_the_world_alone_has_gloo(monkeypatch):
    """CUDA is emulated: what is asked of torch is written down, and made with gloo."""
    stop_world()
    init, new, asked = dist.init_process_group, dist.new_group, []

    def init_process_group(backend, **kwargs):
        asked.append(backend)
        init("gloo", **kwargs)

    def make(*args, backend=None, timeout=None, **kwargs):
        asked.append(backend)
        assert timeout == timedelta(minutes=123)
        return new(*args, backend="gloo", **kwargs)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(dist, "new_group", make)
    monkeypatch.setenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "")
    monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC")
    start_world(ParallelConfig(), timeout=timedelta(minutes=123))
    distributed.new_group([0])
    assert asked[0] == "cpu:gloo,cuda:nccl" and len(asked) > 5 and set(asked[1:]) == {"nccl"}
    assert dist.new_group is make
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == str(123 * 60)
    stop_world()


def places():
    start_world(ParallelConfig(pipeline_model_parallel_size=2))
    return (
        distributed.is_first_stage(),
        distributed.is_last_stage(),
        distributed.data_rank(),
        distributed.data_size(),
        distributed.is_rank_zero(),
    )


def test_places_in_a_world_of_four():
    assert run_ranks(places, 4) == [
        (True, False, 0, 2, True),
        (True, False, 1, 2, False),
        (False, True, 0, 2, False),
        (False, True, 1, 2, False),
    ]


def fail_on_rank_one():
    start_world(ParallelConfig())
    if dist.get_rank() == 1:
        raise RuntimeError("this rank is broken")
    dist.all_reduce(torch.zeros(1))


def test_a_failing_rank_is_named_and_stops_its_peers():
    with pytest.raises(RankFailure, match=r"rank 1 failed:(.|\n)*this rank is broken"):
        run_ranks(fail_on_rank_one, 2, timeout=60)


def wait_forever():
    start_world(ParallelConfig())
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1)
    return dist.get_rank()


def test_ranks_that_hang_are_stopped():
    with pytest.raises(RankFailure, match="did not finish in time"):
        run_ranks(wait_forever, 2, timeout=8)


def gathered_ranks():
    start_world(ParallelConfig())
    return distributed.gather_on_rank_zero(f"rank {dist.get_rank()}")


def test_rank_zero_has_the_objects_of_all_in_order():
    assert run_ranks(gathered_ranks, 3) == [["rank 0", "rank 1", "rank 2"], [], []]


@pytest.mark.parametrize(("visible", "index"), [(8, 5), (1, 0)])
def test_a_process_takes_the_gpu_of_its_rank_or_the_only_one(monkeypatch, visible, index) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert distributed.device() == torch.device("cuda", index)
