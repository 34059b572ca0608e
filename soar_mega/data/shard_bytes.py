"""The bytes of shards by their numbers, from files of this machine or from elsewhere."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from soar_mega.data.shard_cache import ShardCache

OPEN_FILES = 32  # shards kept open for reading


class ShardBytes:
    """Of the shards in a folder.

    Args:
        names: of the shards, without .tar.
        cache: what the folder is where they come from elsewhere; then they need not be in it.
    """

    def __init__(self, folder: Path, names: Sequence[str], cache: ShardCache | None) -> None:
        self._folder, self._names, self._cache = folder, names, cache
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def path(self, shard: int) -> Path:
        return self._folder / f"{self._names[shard]}.tar"

    def read(self, shard: int, start: int, size: int) -> bytes:
        """A part of a shard; fewer bytes where it is shorter. ValueError where it cannot be read."""
        file = self.file(shard)
        if file is not None:
            return os.pread(file, size, start)
        assert self._cache is not None
        return self._cache.read(self.path(shard).name, start, size)

    def file(self, shard: int) -> int | None:
        """The descriptor of a shard, None where it is elsewhere; the least recently used are closed when many are open.

        ValueError: it cannot be opened.
        """
        if shard not in self._files:
            if self._cache is not None and not self._cache.find(self.path(shard).name):
                return None
            try:
                opened = FileIO(self.path(shard))
            except OSError as error:
                # another process may just have made room in the cache
                if self._cache is not None and isinstance(error, FileNotFoundError):
                    return None
                raise ValueError(f"cannot open shard {self.path(shard)}: {error.strerror}") from error
            if len(self._files) == OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = opened
        self._files.move_to_end(shard)
        return self._files[shard].fileno()

    def drop_copy(self, shard: int) -> bool:
        """Removes what may be a damaged copy of a shard; whether there was one."""
        if self._cache is None or shard not in self._files:
            return False
        self._files.pop(shard).close()
        self._cache.drop(self.path(shard).name)
        return True
