"""What a forked process collects: its own garbage, and never its parent's."""

import gc
from collections.abc import Iterator

import pytest

from soar_mega.checkpoints.background import Background
from soar_mega.data.order import Stretch
from soar_mega.data.readers import Readers
from soar_mega.data.shards import Read


class Thread:
    """In a cycle, like a group of ranks that is no more; its end is remembered in the process where it came."""

    ended: list[str] = []

    def __init__(self, of: str) -> None:
        self.of, self.itself = of, self

    def __del__(self) -> None:
        self.ended.append(self.of)


@pytest.fixture
def garbage() -> Iterator[None]:
    gc.collect()
    gc.disable()
    Thread("parent")
    yield
    gc.enable()
    gc.collect()
    Thread.ended.clear()


def collected() -> list[str]:
    Thread("child")
    gc.collect()
    return Thread.ended


def read(stretch: Stretch) -> Read:
    return Read(tensors={}, names=collected())


def in_a_reader() -> list[str]:
    readers = Readers(read, [Stretch(bucket="16x16", first=0, position=0, count=1)], 1)
    try:
        return next(readers).names
    finally:
        readers.close()


@pytest.mark.parametrize(
    "fork", [lambda: Background(collected).outcome(), in_a_reader], ids=["save", "reader"]
)
def test_a_forked_process_leaves_the_garbage_of_its_parent(fork, garbage) -> None:
    assert fork() == ["child"]
