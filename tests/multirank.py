"""Run a test function on several gloo processes with a hard timeout.

The processes are forked from a server that has imported all they need once, so that a case takes a fraction of a second
to start and inherits nothing from the test runner (no process group, no threads).
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["megatron.core.optimizer", "deepspeed", "pytest", "soar_mega.training.run"])


class RankFailure(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` on `world_size` processes and return the results in rank order.

    `function` must be importable (defined at the top of a test module) and starts its own world
    (`soar_mega.distributed.start_world`), which finds the usual torchrun environment.

    Raises:
        RankFailure: the first rank that failed, with its traceback, or the ranks still running after `timeout` seconds.
    """
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )
    processes, receivers = [], []
    for rank in range(world_size):
        receiver, sender = SERVER.Pipe(duplex=False)
        arguments = (sender, function, args, rank, world_size, store.port, timeout)
        process = SERVER.Process(target=_run_rank, args=arguments)
        process.start()
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    try:
        return _collect(receivers, time.monotonic() + timeout)
    finally:
        for process in processes:
            # its group too: a checkpoint save leaves a process behind that would outlive a killed rank
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = {r: rank for rank, r in enumerate(receivers) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailure(f"ranks {sorted(waiting.values())} did not finish in time")
        for receiver in ready:
            rank = waiting[receiver]  # type: ignore[index]
            try:
                ok, value = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RankFailure(f"rank {rank} died without a word") from None
            if not ok:
                raise RankFailure(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def _run_rank(
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    size: int,
    port: int,
    limit: float,
) -> None:
    os.setpgid(0, 0)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the test runner holds the store, as torchrun's agent does
    )
    torch.set_num_threads(1)
    from soar_mega import distributed, platform

    platform.install()
    try:
        message = (True, function(*args))
        if dist.is_initialized():
            dist.barrier()
            distributed.stop_world()
    except BaseException:
        message = (False, traceback.format_exc())
    # plain pickle: tensors travel as bytes and do not depend on this process living on
    sender.send_bytes(pickle.dumps(message))
    os._exit(0)
