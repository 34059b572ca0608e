"""What the tests of training share."""

from pathlib import Path

import pytest
from tiny_runs import make_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up training data for the tiny model, which nobody changes."""
    return make_shards(tmp_path_factory.mktemp("data") / "train", 48, seed=1)
