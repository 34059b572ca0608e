"""Tries other launches of the kernels on the GPU at hand, and says which entries of kernels/tables.py to change.

    python tools/tune_kernels.py                     SD3.5-Medium: about a minute, most of it for the compiler
    python tools/tune_kernels.py --model FLUX --only adaln

For each class of shapes every candidate's device time by the profiler, as tools/bench_kernels.py measures it; then that
tool, for the numbers that are kept.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from unittest import mock

import torch
from bench_kernels import beyond_cache, counted, device_seconds
from kernel_cases import all_cases

from soar_mega.kernels import adaln, bias_gelu, gated_add, qk_norm_rope
from soar_mega.kernels.tables import LAUNCHES, Launch

# keep sizes of launches
CHECKS = (adaln._checked, bias_gelu._checked, gated_add._checked, qk_norm_rope._checked)
MODELS = ("SD3.5-M", "SD3.5-L", "FLUX")


@dataclass(frozen=True)
class Sweep:
    """The candidates of one class of shapes, and the case of tools/kernel_cases.py that they are tried at."""

    operation: str
    shape_class: str
    case: str
    blocks: tuple[int, ...]
    num_warps: tuple[int, ...]

    def candidates(self) -> list[Launch]:
        """The launch of now first."""
        now = LAUNCHES[self.operation][self.shape_class]["any"]
        tried = (Launch(*values) for values in product(self.blocks, self.num_warps))
        return list(dict.fromkeys([now, *tried]))


def sweeps(model: str) -> list[Sweep]:
    """Of the kernels of a model's layers."""
    width = 2048 if model == "SD3.5-M" else 4096
    wider = width // 2048
    rotary = " rotary" if model == "FLUX" else ""

    def of(operation: str, shape_class: str, part: str, blocks: Sequence[int], warps: Sequence[int]) -> Sweep:
        return Sweep(operation, shape_class, f"{operation} {model} {part}", tuple(blocks), tuple(warps))

    return [
        of("adaln", f"forward {width}", "forward", (1, 2, 4, 8), (4 * wider, 8 * wider)),
        of("adaln", f"backward {width}", "both", (8, 128, 256), (4 * wider, 8, 16)),
        of("qk_norm_rope", f"forward{rotary}", "forward", (512, 1024, 2048), (2, 4, 8)),
        of("qk_norm_rope", f"backward{rotary}", "both", (512, 1024, 2048), (4, 8)),
        of("bias_gelu", "16 bit", "both", (512, 1024, 2048), (4, 8)),
        of("gated_add", "16 bit", "both", (256, 512, 1024), (2, 4)),
    ]


@contextlib.contextmanager
def launched_by(sweep: Sweep, launch: Launch) -> Iterator[None]:
    """The table has this launch, on every architecture, and nothing is left of sizes by another one."""
    with mock.patch.dict(LAUNCHES[sweep.operation], {sweep.shape_class: {"any": launch}}):
        forget_sizes()
        yield
    forget_sizes()


def forget_sizes() -> None:
    for check in CHECKS:
        check.known.clear()  # type: ignore[union-attr]


def calls_of(sweep: Sweep) -> list[Callable[[], object]]:
    """The fused form of its case, on inputs that take turns."""
    make = all_cases()[sweep.case]
    return [case.fused for case in beyond_cache(make, counted(make(torch.device("meta")).fused))]


def times(
    sweep: Sweep, calls: Sequence[Callable[[], object]], measure: Callable[..., float]
) -> dict[Launch, float]:
    """Seconds of each candidate."""
    found = {}
    for launch in sweep.candidates():
        with launched_by(sweep, launch):
            found[launch] = measure(calls)
    return found


def words(sweep: Sweep, found: dict[Launch, float]) -> str:
    """The launch of now, the best one, and all times."""
    now, best = next(iter(found)), min(found, key=lambda launch: found[launch])
    each = ", ".join(f"{launch.block}/{launch.num_warps} {1e6 * s:.1f}" for launch, s in found.items())
    return (
        f"{sweep.case}, {sweep.shape_class}: {1e6 * found[now]:.1f} us by {now}; best {1e6 * found[best]:.1f} us by "
        f"{best}\n  block/warps us: {each}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--only", default="", help="operations whose name contains this")
    args = parser.parse_args()
    chosen = [sweep for sweep in sweeps(args.model) if args.only in sweep.operation]
    if not chosen:
        known = dict.fromkeys(sweep.operation for sweep in sweeps(args.model))
        parser.error(f"--only {args.only!r} is in none of these names: {', '.join(known)}")
    if not torch.cuda.is_available():
        parser.error("launches are timed on a GPU, and torch finds none")
    for sweep in chosen:
        print(words(sweep, times(sweep, calls_of(sweep), device_seconds)), flush=True)


if __name__ == "__main__":
    main()
