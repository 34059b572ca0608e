"""Measures what the model costs its host, without a GPU: process time of SD3.5-Medium's graph at a tiny width.

    python tools/bench_host.py
    python tools/bench_host.py --layers 38 --dual 0      the depth of SD3.5-Large

At a width where nothing takes time to compute, what is left is what a step on a GPU waits for: Python, autograd, and
torch's own calls. Three forms of the same model take turns, in a forward without gradients (an answer of the model) and
in a forward with its backward. torch is as it is on a GPU, without what stands in for one elsewhere
(soar_mega/platform.py):

    plain       adaLN and QK norm by plain torch calls
    fused       by the kernels' twins on the CPU
    launching   by the code that launches the Triton kernels, with the launches themselves left out

Printed: the lowest of all rounds in milliseconds, and the ratio to plain, the median of what it was in each round: a
machine that is now fast and now slow is the same to all forms of a round. Writes JSON.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from arguments import number, positive, result_file
from kernel_traffic import modules_that_launch
from origin import origin
from torch import Tensor

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.models.common.build import build_model
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.common.transformer import Transformer
from soar_mega.models.family import presets, read_sizes
from soar_mega.rules import at_least

FORMS = ("plain", "fused", "launching")
Times = dict[str, dict[str, list[float]]]  # form -> forward or both -> seconds of each round


def tiny(layers: int, dual: int) -> Sizes:
    """SD3.5-Medium with a hidden size of 16; the first `dual` layers have the second attention."""
    return read_sizes(
        presets()["sd35_medium"].to_diffusers()
        | {
            "num_layers": layers,
            "dual_attention_layers": tuple(range(dual)),
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "pos_embed_max_size": 4,
            "sample_size": 4,
        }
    )


def inputs(sizes: Sizes) -> tuple[Tensor, ...]:
    """Latents, timesteps, text and pooled text of two samples: 4 image tokens and 3 text tokens each."""
    return (
        torch.randn(2, sizes.in_channels, 4, 4),
        torch.tensor([250.0, 750.0]),
        torch.randn(2, 3, sizes.joint_attention_dim),
        torch.randn(2, sizes.pooled_projection_dim),
    )


@contextlib.contextmanager
def launches_left_out() -> Iterator[None]:
    """CPU tensors take the way of CUDA tensors, but for the launch: what comes out has no meaning."""
    with contextlib.ExitStack() as patches:
        for module in modules_that_launch():
            patches.enter_context(mock.patch.object(module, "launch", nothing))
            if hasattr(module, "launches"):
                patches.enter_context(mock.patch.object(module, "launches", lambda device: True))
        yield


def nothing(*args: object, **options: object) -> None:
    """Stands for a launch."""


def measure(sizes: Sizes, rounds: int) -> Times:
    """Process time of every form, round by round, after two that are not counted."""
    models = {
        fused: build_model(sizes, ModelConfig(init="random", fused_kernels=fused), ParallelConfig())
        for fused in (False, True)
    }
    given = inputs(sizes)
    times: Times = {form: {"forward": [], "both": []} for form in FORMS}
    for turn in range(rounds + 2):
        for form in FORMS:
            model = models[form != "plain"]
            with launches_left_out() if form == "launching" else contextlib.nullcontext():
                forward, both = process_time(forward_of(model, given)), process_time(step_of(model, given))
            if turn >= 2:
                times[form]["forward"].append(forward)
                times[form]["both"].append(both)
    return times


def forward_of(model: Transformer, given: tuple[Tensor, ...]) -> Callable[[], object]:
    return torch.no_grad()(lambda: model(*given))


def step_of(model: Transformer, given: tuple[Tensor, ...]) -> Callable[[], object]:
    def step() -> None:
        model.zero_grad()
        model(*given).sum().backward()

    return step


def process_time(call: Callable[[], object]) -> float:
    """Seconds that this process computes: what else the machine does is not counted."""
    started = time.process_time()
    call()
    return time.process_time() - started


def summary(times: Times) -> dict[str, dict[str, float]]:
    """The lowest in milliseconds, and the ratio to the plain form: the median of all rounds'."""
    return {
        form: {f"{part}_ms": 1e3 * min(found) for part, found in parts.items()}
        | {f"{part}_ratio": _ratio(found, times["plain"][part]) for part, found in parts.items()}
        for form, parts in times.items()
    }


def _ratio(seconds: list[float], plain: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(seconds, plain, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=positive, default=24)
    parser.add_argument(
        "--dual",
        type=number(int, at_least(0)),
        default=13,
        help="layers with the second attention (default: 13)",
    )
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/<date>-cpu-host.json)")
    args = parser.parse_args()
    if args.dual > args.layers:
        parser.error(f"--dual {args.dual}: there are --layers {args.layers}, and no more can have it")
    path = result_file(args.out, "cpu-host")
    torch.set_num_threads(1)
    found = summary(measure(tiny(args.layers, args.dual), args.rounds))
    print(f"{args.layers} layers, {args.dual} of them dual, hidden size 16")
    print(f"the lowest of {args.rounds} rounds, and the median of their ratios")
    print(f"{'':10} {'forward ms':>11} {'ratio':>6} {'with backward ms':>17} {'ratio':>6}")
    for form, row in found.items():
        print(
            f"{form:10} {row['forward_ms']:11.1f} {row['forward_ratio']:6.2f} "
            f"{row['both_ms']:17.1f} {row['both_ratio']:6.2f}"
        )
    content = {
        **origin("bench_host"),
        "device": "cpu",
        "layers": args.layers,
        "dual_layers": args.dual,
        "rounds": args.rounds,
        "load_average": os.getloadavg()[0],
        "forms": found,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
