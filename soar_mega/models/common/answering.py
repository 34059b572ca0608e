"""Whether a forward is an answer, from which nothing is learned: it may take kernels that training cannot.

That no gradient is wanted says less: what is measured without one must be what training would compute, to the last bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


@contextmanager
def answering() -> Iterator[None]:
    """Forwards within are answers."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_answering() -> bool:
    """Whether a forward is an answer."""
    return _depth > 0
