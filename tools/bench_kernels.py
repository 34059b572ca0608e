"""Times the kernels on a GPU, or predicts from counted bytes what they will take on one.

    python tools/bench_kernels.py                   all operations at SD3.5 and FLUX shapes
    python tools/bench_kernels.py --only loss --out /tmp/bench.json

On CUDA: each operation fused, eager, and eager under torch.compile; the median of 50 calls between events, the
bandwidth, and its share of a copy's bandwidth measured in the same run. On the CPU: counted launches and bytes (the
meta device stands for the GPU, see kernel_traffic.py), and the time that the bytes take at a stated bandwidth. Writes
JSON and a roofline picture next to it.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
from kernel_traffic import Counter, Traffic
from origin import origin
from torch import Tensor

from soar_mega.kernels import correction_loss, rollout_renoise
from soar_mega.kernels.adaln import adaln, plain_adaln
from soar_mega.kernels.bias_gelu import bias_gelu, plain_bias_gelu
from soar_mega.kernels.gated_add import gated_add, plain_gated_add
from soar_mega.kernels.qk_norm_rope import Projected, plain_qk_norm_rope, qk_norm_rope

LATENTS = {"512 px": (16, 64, 64), "1024 px": (16, 128, 128)}  # the VAEs of SD3.5 and FLUX have 16 channels
H100_COPY = 2.8e12  # bytes per second that a large copy reaches on an H100 SXM, for predictions without a GPU
LAUNCH_SECONDS = 4e-6  # of one small launch, for the same


@dataclass(frozen=True)
class Case:
    """One operation at one shape: fused and eager do the same work."""

    name: str
    fused: Callable[[], object]
    eager: Callable[[], object]


@dataclass(kw_only=True)
class Row:
    """What was measured or predicted of one form of one case."""

    name: str
    form: str
    launches: int
    bytes: int
    seconds: float
    measured: bool

    @property
    def bandwidth(self) -> float:
        return self.bytes / self.seconds


def soar_cases(device: torch.device) -> list[Case]:
    """States and losses of B = 4 samples, N = 1 and 6 points; noise given, so that all forms read the same."""
    cases = []
    for label, shape in LATENTS.items():
        for points in (1, 6):
            z0, z1, v_uncond, v_cond = (torch.randn(4, *shape, device=device) for _ in range(4))
            rows = torch.randn(4, points, 6, dtype=torch.float64)
            rows[..., 4:] = 0
            velocity = torch.randn(4, points, *shape, device=device, requires_grad=True)
            cases += [
                states_case(f"rollout_renoise {label} N={points}", [z0, z1, v_uncond, v_cond], rows),
                loss_case(f"correction_loss {label} N={points}", [z0, z1, v_uncond, v_cond], rows, velocity),
            ]
    return cases


def states_case(name: str, sources: list[Tensor], rows: Tensor) -> Case:
    z0, z1, v_uncond, v_cond = sources

    def fused() -> Tensor:
        return rollout_renoise(z0, z1, v_uncond, v_cond, rows, dtype=torch.bfloat16)

    on_device = rows.to(z0.device)

    def eager() -> Tensor:
        return plain(sources, on_device).bfloat16()

    return Case(name, fused, eager)


def loss_case(name: str, sources: list[Tensor], rows: Tensor, velocity: Tensor) -> Case:
    z0, z1, v_uncond, v_cond = sources

    def gradient(losses: Tensor) -> Tensor:
        return torch.autograd.grad(losses.sum(), velocity)[0]

    def fused() -> Tensor:
        return gradient(correction_loss(velocity, z0, z1, v_uncond, v_cond, rows))

    on_device = rows.to(z0.device)

    def eager() -> Tensor:
        return gradient((velocity - plain(sources, on_device)).square().flatten(2).mean(dim=2))

    return Case(name, fused, eager)


def plain(sources: list[Tensor], rows: Tensor) -> Tensor:
    """Rows [B, N, 6] over four sources by plain calls: what torch.compile gets to fuse."""
    z0, *others = (source[:, None] for source in sources)
    first, *factors = (column[..., None, None, None].float() for column in rows.unbind(-1)[:4])
    total = first * z0
    for factor, source in zip(factors, others, strict=True):
        total = torch.addcmul(total, factor, source)
    return total


def adaln_cases(device: torch.device) -> list[Case]:
    """A gated site of each model at 512 px (1024 image tokens, text beside them), B = 4, forward and backward."""
    cases = []
    for model, tokens, width in (("SD3.5-M", 1357, 1536), ("SD3.5-L", 1357, 2432), ("FLUX", 1536, 3072)):
        made = [torch.randn(tokens, 4, width, device=device, dtype=torch.bfloat16) for _ in range(2)]
        vectors = [torch.randn(4, width, device=device, dtype=torch.bfloat16) for _ in range(3)]
        bias = torch.randn(width, device=device, dtype=torch.bfloat16).requires_grad_()
        (residual, branch), (shift, scale, gate) = (
            [tensor.requires_grad_() for tensor in group] for group in (made, vectors)
        )
        arguments = (residual, shift, scale, branch, gate, bias)
        cases += [
            Case(f"adaln {model} forward", partial(adaln, *arguments), partial(plain_adaln, *arguments)),
            Case(
                f"adaln {model} both",
                partial(gradients, adaln, arguments),
                partial(gradients, plain_adaln, arguments),
            ),
        ]
    return cases


def qk_cases(device: torch.device) -> list[Case]:
    """Image and text of a joint attention at 512 px, B = 4, with the bias of the linear before."""
    cases = []
    for model, heads, width in (("SD3.5-M", 24, 64), ("SD3.5-L", 38, 64), ("FLUX", 24, 128)):
        text = 512 if model == "FLUX" else 333
        tensors: list[Tensor] = []

        def leaf(*shape: int, into: list[Tensor] = tensors) -> Tensor:
            into.append(torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_())
            return into[-1]

        features = 3 * heads * width
        streams = [
            Projected(leaf(tokens, 4, features), tokens, leaf(features), leaf(width), leaf(width))
            for tokens in (1024, text)
        ]
        cosine, sine = (
            torch.randn(1024 + text, width, device=device) if model == "FLUX" else None for _ in range(2)
        )
        fused, eager = (
            partial(form, streams, width, cosine, sine) for form in (qk_norm_rope, plain_qk_norm_rope)
        )
        cases += [
            Case(f"qk_norm_rope {model} forward", fused, eager),
            Case(
                f"qk_norm_rope {model} both",
                partial(gradients_of, fused, tensors),
                partial(gradients_of, eager, tensors),
            ),
        ]
    return cases


def mlp_cases(device: torch.device) -> list[Case]:
    """Behind an MLP's first linear and behind its second, image tokens at 512 px, B = 4."""
    cases = []
    for model, width in (("SD3.5-M", 1536), ("SD3.5-L", 2432), ("FLUX", 3072)):

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_()

        wide = (leaf(1024, 4, 4 * width), leaf(4 * width))
        joined = (leaf(1024, 4, width), leaf(1024, 4, width), leaf(4, width), leaf(width))
        for name, fused, eager, arguments in (
            ("bias_gelu", bias_gelu, plain_bias_gelu, wide),
            ("gated_add", gated_add, plain_gated_add, joined),
        ):
            forms = [partial(in_a_tuple, form, arguments) for form in (fused, eager)]
            both = [partial(gradients_of, form, arguments) for form in forms]
            cases += [Case(f"{name} {model} forward", *forms), Case(f"{name} {model} both", *both)]
    return cases


def in_a_tuple(operation: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (operation(*arguments),)


def gradients(
    operation: Callable[..., tuple[Tensor, ...]], arguments: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Forward and backward of tensors that all are differentiable, with ones from above."""
    return gradients_of(partial(operation, *arguments), arguments)


def gradients_of(call: Callable[[], tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of `inputs` of what `call` computes from them, with ones from above."""
    outputs = call()
    return torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])


def all_cases(device: torch.device) -> list[Case]:
    return [*soar_cases(device), *adaln_cases(device), *qk_cases(device), *mlp_cases(device)]


def main() -> None:
    args = parse_arguments()
    gpu = torch.cuda.is_available()
    cases = [c for c in all_cases(torch.device("cuda" if gpu else "meta")) if args.only in c.name]
    copy = copy_bandwidth() if gpu else H100_COPY
    rows = [row for case in cases for row in (measured(case) if gpu else predicted(case, copy))]
    device = torch.cuda.get_device_name() if gpu else "none: predicted for an H100"
    print_table(rows, copy, device)
    path = Path(args.out or f"benchmarks/results/{date.today()}-{'gpu' if gpu else 'cpu'}-kernels.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        **origin("bench_kernels"),
        "device": device,
        "copy_bandwidth": copy,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    draw_roofline(rows, copy, device, path.with_suffix(".png"))
    print(f"\nWritten to {path} and {path.with_suffix('.png')}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", help="where to write the JSON (default: benchmarks/results/<date>-...)")
    return parser.parse_args()


def predicted(case: Case, copy: float) -> list[Row]:
    """Counted launches and bytes, and the time they take at the bandwidth of a copy plus that of the launches."""
    rows = []
    for form, call in (("fused", case.fused), ("eager", case.eager)):
        found = counted(call)
        seconds = found.bytes / copy + found.launches * LAUNCH_SECONDS
        rows.append(Row(name=case.name, form=form, seconds=seconds, measured=False, **asdict(found)))
    return rows


def measured(case: Case) -> list[Row]:
    """Times of the three forms; all are held against the bytes that the fused one cannot avoid."""
    moved = counted_on_meta(case.name)
    forms = {"fused": case.fused, "eager": case.eager, "torch.compile": torch.compile(case.eager)}
    return [
        Row(
            name=case.name,
            form=form,
            launches=moved.launches if form == "fused" else 0,
            bytes=moved.bytes,
            seconds=seconds_of(call),
            measured=True,
        )
        for form, call in forms.items()
    ]


def counted(call: Callable[[], object]) -> Traffic:
    """Of a case whose tensors are on the meta device."""
    with Counter() as counter:
        call()
    return counter.traffic


def counted_on_meta(name: str) -> Traffic:
    (case,) = (case for case in all_cases(torch.device("meta")) if case.name == name)
    return counted(case.fused)


def seconds_of(call: Callable[[], object], repeats: int = 50) -> float:
    """Median over calls, each between two events, after a warm-up."""
    for _ in range(10):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy beyond the L2 cache."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source))


def print_table(rows: list[Row], copy: float, device: str) -> None:
    print(f"{device}; copy bandwidth {copy / 1e9:.0f} GB/s")
    kind = "measured" if rows and rows[0].measured else "predicted"
    print(
        f"{'operation':36} {'form':14} {'launches':>8} {'MiB':>9} {kind + ' us':>13} {'GB/s':>7} {'of copy':>7}"
    )
    for r in rows:
        print(
            f"{r.name:36} {r.form:14} {r.launches or '':>8} {r.bytes / 2**20:9.1f} {r.seconds * 1e6:13.1f} "
            f"{r.bandwidth / 1e9:7.0f} {r.bandwidth / copy:7.0%}"
        )


def draw_roofline(rows: list[Row], copy: float, device: str, path: Path) -> None:
    """Bandwidth over bytes: these operations compute little, so the roof is the copy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for form in dict.fromkeys(row.form for row in rows):
        points = [(row.bytes / 2**20, row.bandwidth / 1e9) for row in rows if row.form == form]
        axes.loglog(*zip(*points, strict=True), "o", label=form)
    axes.axhline(copy / 1e9, color="grey", label="copy")
    axes.set(
        xlabel="MiB moved",
        ylabel="GB/s",
        title=f"{device} ({'measured' if rows[0].measured else 'predicted'})",
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
