"""When Python may collect what lies in cycles: it may end there what a recording, or a forked process, cannot end."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_waits() -> Iterator[None]:
    """Nothing in a cycle is collected meanwhile, nor in a process that is forked meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def leave_garbage_of_parent() -> None:
    """In a process that was forked while garbage waited: what it makes itself is collected, and never the parent's.

    To end the parent's groups of ranks or CUDA graphs in a copy of it, where their threads are not, hangs or crashes.
    """
    gc.freeze()
    gc.enable()
