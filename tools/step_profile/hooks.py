"""What is marked within the phases of a step, from outside: nothing of it is in the library."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from step_profile.recorder import Recorder

from soar_mega.engines.channel import Messages
from soar_mega.engines.engine import Engine
from soar_mega.phases import phases

MESSAGES = [name for name in vars(P2PCommunicator) if name.startswith(("recv_", "send_"))]


@contextlib.contextmanager
def marked(recorder: Recorder, engine: Engine, micro_batches: dict[str, int]) -> Iterator[None]:
    """Marks phases, forward and backward of each micro-batch, messages, gradient reduction and parameter gather.

    Args:
        micro_batches: receives how many there are in the answer and the learn phase.
    """
    pipeline, config = engine._pipeline, engine.model.config
    run = pipeline.run

    def marked_run(forward_step: Callable[..., Any], steps: list[Any], *args: Any, **kwargs: Any) -> None:
        micro_batches[phases.phase] = len(steps)
        run(_forward(recorder, forward_step), steps, *args, **kwargs)

    with contextlib.ExitStack() as stack:

        def mark(owner: Any, attribute: str, name: str) -> None:
            function = recorder.around(getattr(owner, attribute), name)
            stack.enter_context(patch.object(owner, attribute, function))

        stack.enter_context(recorder.following(phases))
        stack.enter_context(patch.object(pipeline, "run", marked_run))
        mark(schedules, "backward_step", "backward")
        for name in MESSAGES:
            mark(P2PCommunicator, name, "messages")
        if engine._channel is not None:
            mark(Messages, "wait", "messages")
        if config.finalize_model_grads_func is not None:
            mark(config, "finalize_model_grads_func", "gradient reduction")
        for chunk in pipeline.chunks:
            if hasattr(chunk, "backward"):  # DeepSpeed's, which reduces gradients within it
                mark(chunk, "backward", "backward")
            if hasattr(chunk, "start_param_sync"):  # megatron's
                for group in chunk.bucket_groups:
                    mark(group, "start_param_sync", "parameter gather")
                    gathered = _where_it_waits(recorder, group)
                    stack.enter_context(patch.object(group, "finish_param_sync", gathered))
        yield


def _where_it_waits(recorder: Recorder, group: Any) -> Callable[..., Any]:
    """A group's `finish_param_sync`. Each forward asks for each parameter, and a step waits for each group once.

    A span around each call would take longer than the calls: 6,000 in a step of SD3.5-Medium on one GPU.
    """
    finish = group.finish_param_sync
    marked_finish = recorder.around(finish, "parameter gather")

    def called(*args: Any, **kwargs: Any) -> Any:
        is_gathered = group.param_gather_dispatched and group.param_gather_handle is None
        return (finish if is_gathered else marked_finish)(*args, **kwargs)

    return called


def _forward(recorder: Recorder, forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a micro-batch, and then its loss, or where its answer is put."""

    def marked_step(*args: Any, **kwargs: Any) -> Any:
        recorder.begin("forward")
        try:
            output, finish = forward_step(*args, **kwargs)
        finally:
            recorder.end()
        return output, recorder.around(finish, "forward")

    return marked_step
