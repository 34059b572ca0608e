"""Layers, precision, attention, recomputation, recorded layers and overlaps, in every combination: the same losses.

Transformer Engine, flash-attn and CUDA graphs are stood for by what computes the same on a CPU; FP8 by a stand-in that
casts without rounding, and in a precision of its own ("emulated") by one that rounds. The losses in float32 are those
that were recorded for the run of test_train.py.
"""

import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_runs import steps

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("models", "engines"))
import flash_stand_in
import te_stand_in
from emulated_fp8 import emulate
from repeated_work import RepeatedWork

from soar_mega.layer_checks import LINEAR_INPUTS, RECOMPUTE_MODULES

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 3


class Cell(NamedTuple):
    precision: str = "fp32"
    layers: str = "local"
    attention: str = "sdpa"
    recomputation: str = "none"
    is_recorded: bool = False
    overlaps: bool = False

    @property
    def is_possible(self) -> bool:
        """Flash attention and FP8 are for bf16; what emulates FP8 changes torch's linears."""
        if self.precision == "emulated" and self.layers != "local":
            return False
        return self.precision != "fp32" or (self.layers != "fp8" and self.attention == "sdpa")

    def settings(self) -> dict[str, Any]:
        overlaps = str(self.overlaps).lower()
        found = {
            "model__dtype": "fp32" if self.precision == "fp32" else "bf16",
            "model__transformer_impl": "local" if self.layers == "local" else "transformer_engine",
            "model__attention_backend": self.attention,
            **self.recomputed(),
            "parallel__overlap_grad_reduce": overlaps,
            "parallel__overlap_param_gather": overlaps,
        }
        return found | ({"model__fp8": "hybrid"} if self.layers == "fp8" else {})

    def recomputed(self) -> dict[str, Any]:
        if self.recomputation != "parts":
            return {"model__recompute_granularity": self.recomputation}
        useless = LINEAR_INPUTS if self.layers == "fp8" else ()
        modules = [name for name in RECOMPUTE_MODULES if name not in useless]
        return {"model__recompute_granularity": "selective", "model__recompute_modules": modules}


AXES = (
    ("fp32", "bf16", "emulated"),
    ("local", "transformer_engine", "fp8"),
    ("sdpa", "flash"),
    ("none", "selective", "parts", "full"),
    (False, True),
    (False, True),
)
ALL = [cell for cell in (Cell(*values) for values in product(*AXES)) if cell.is_possible]
FEW = [
    Cell("fp32", "transformer_engine", "sdpa", "full", True, False),
    Cell("bf16", "fp8", "flash", "parts", True, True),
    Cell("bf16", "local", "flash", "full", False, True),
    Cell("emulated", "local", "sdpa", "parts", True, True),
]


@pytest.fixture(scope="module")
def plain_losses() -> dict[tuple[str, str], list[float]]:
    """Of each precision and attention, once they are known."""
    return {}


def losses(cell: Cell, shards: Path, folder: Path) -> list[float]:
    with steps(shards, folder, train__train_iters=STEPS, **cell.settings()) as run:
        if cell.precision == "emulated":
            assert len(emulate(run.engine.model, "hybrid")) == 31
        if cell.is_recorded:
            run.engine.record_layers(partial(RepeatedWork, run.engine))  # type: ignore[attr-defined]
        found = []
        for _ in range(STEPS):
            found.append(run.learn()["loss"])
            assert run.update().ok
    return found


def check(cells: list[Cell], plain: dict[tuple[str, str], list[float]], shards: Path, folder: Path) -> None:
    for number, cell in enumerate(cells):
        for attention in ("sdpa", cell.attention):
            kind = (cell.precision, attention)
            if kind not in plain:
                plain[kind] = losses(
                    Cell(cell.precision, attention=attention), shards, folder / " ".join(kind)
                )
        ours = plain[cell.precision, cell.attention]
        assert losses(cell, shards, folder / str(number)) == pytest.approx(ours, rel=1e-6), cell
        # another attention rounds elsewhere, and a step makes more of it
        assert ours[0] == pytest.approx(plain[cell.precision, "sdpa"][0], rel=5e-3), cell


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    te_stand_in.install(monkeypatch)
    flash_stand_in.install(monkeypatch)


def test_a_few_settings(
    stand_ins: None, plain_losses: dict[tuple[str, str], list[float]], shards: Path, tmp_path: Path
) -> None:
    check(FEW, plain_losses, shards, tmp_path)
    recorded = json.loads(GOLDEN.read_text()).get(torch.__version__.split("+")[0])
    if recorded is not None:
        assert plain_losses["fp32", "sdpa"] == pytest.approx(recorded["losses"][:STEPS], rel=1e-3)
    # something was rounded
    assert plain_losses["emulated", "sdpa"] != pytest.approx(plain_losses["bf16", "sdpa"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "layers"), sorted({(cell.precision, cell.layers) for cell in ALL}))
def test_all_settings(
    precision: str,
    layers: str,
    stand_ins: None,
    plain_losses: dict[tuple[str, str], list[float]],
    shards: Path,
    tmp_path: Path,
) -> None:
    cells = [cell for cell in ALL if (cell.precision, cell.layers) == (precision, layers)]
    assert len(cells) >= 12
    check(cells, plain_losses, shards, tmp_path)
