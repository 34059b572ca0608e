"""Checkpoints go forward from one megatron-core to a newer one; the other way they are refused."""

import shutil
from pathlib import Path

import kept_checkpoints
import megatron.core
import pytest
from multirank import run_ranks
from packaging.version import Version

SUFFIX = ".tar.xz"
KEPT = sorted(file.name.removesuffix(SUFFIX) for file in kept_checkpoints.DATA.iterdir())


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as failure:
        kept_checkpoints.read(folder)
    return str(failure.value)


@pytest.mark.parametrize("kept", KEPT)
def test_a_checkpoint_of_another_version(kept: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.unpack_archive(kept_checkpoints.DATA / f"{kept}{SUFFIX}", folder)
    wrote, here = Version(kept.rsplit("-", 1)[1]), Version(megatron.core.__version__)
    if here < Version("0.19") <= wrote:
        [said] = run_ranks(refusal, 1, folder)
        assert f"{folder}/iter_0000003 was written with megatron-core 0.19 or newer, and {here}" in said
        return
    [(progress, steps, tensors)] = run_ranks(kept_checkpoints.read, 1, folder)
    assert progress == kept_checkpoints.PROGRESS and steps == kept_checkpoints.STEPS
    assert {key.split(".")[0] for key in tensors} == {"optimizer", "weights"} and len(tensors) > 40
    for key, tensor in tensors.items():
        assert tensor.equal(kept_checkpoints.numbers(key, tensor)), key
