"""The specialisations of the kernels that training launches: what is compiled ahead of time, and what it moves.

A variant names an operation's Triton source and the types of its arguments as a launch passes them. Sizes are those of
SD3.5 at 512 px where the source needs one at compile time.
"""

from dataclasses import dataclass

from soar_mega.kernels.dispatch import power_of_two
from soar_mega.kernels.qk_norm_rope import HEADS
from soar_mega.kernels.sums import LINES
from soar_mega.kernels.tables import launch_of

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2, "i64": 8}
MOST_REGISTERS = 64  # of 65,536 per multiprocessor: half of the threads it can hold
TWO_PROGRAMS = 128  # of 256 threads, which read ahead and so keep the memory busy
ADALN_REGISTERS = {
    ("forward", 2048): MOST_REGISTERS,
    ("forward", 4096): 72,  # sm_100 takes two more than sm_90
    ("backward", 2048): TWO_PROGRAMS,
    ("backward", 4096): 255,  # one program that reads ahead is as fast as two, so long as nothing spills
}
SOURCES = ("z0", "z1", "v_uncond", "v_cond", "eps", "z1_aux")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """pointers: argument -> element type; None where the tensor is absent. integers: arguments that are sizes.

    read, written: the pointers whose elements are streamed, for the byte counts. width: the least bits of their loads
    and stores; 0 where it is not asserted. registers: the most that a thread may need.
    """

    name: str
    module: str  # of soar_mega.kernels.source
    kernel: str
    pointers: dict[str, str | None]
    integers: tuple[str, ...]
    constants: dict[str, object]
    num_warps: int = 4
    read: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    width: int = 128
    registers: int = MOST_REGISTERS

    def bytes_read(self) -> int:
        """Per element of a sample (per element of a point for the velocity), or of the tokens."""
        return self._bytes(self.read)

    def bytes_written(self) -> int:
        """Per element of a point, or of the tokens."""
        return self._bytes(self.written)

    def _bytes(self, names: tuple[str, ...]) -> int:
        types = [self.pointers[name] for name in names]
        return sum(WIDTHS[kind] for kind in types if kind is not None)


def rollout_renoise() -> list[Variant]:
    """The wired form draws z1; the widest reads all six; stochastic paths draw their noise too."""

    def latent(name: str, source: str, out: str, given: str, drawn: str = "") -> Variant:
        return Variant(
            name=f"rollout_renoise {name}",
            module="rollout_renoise",
            kernel="rollout_renoise_latent_kernel",
            pointers=_sources(given, source) | {"groups": "i64", "points": "fp32", "out": out},
            integers=("size",),
            constants=_draws(drawn) | {"BLOCK": 1024},
            num_warps=4 if "bf16" in (source, out) else 8,
            read=SOURCES,
            written=("out",),
        )

    tokens = Variant(
        name="rollout_renoise tokens, z1 drawn",
        module="rollout_renoise",
        kernel="rollout_renoise_tokens_kernel",
        pointers=_sources("z0 v_uncond v_cond", "fp32") | {"groups": "i64", "points": "fp32", "out": "bf16"},
        integers=("height", "width"),
        constants=_draws("z1") | {"CHANNELS": 16, "CHANNELS_TILE": 16, "PATCH": 2, "WIDTH_TILE": 32},
        read=SOURCES,
        num_warps=8,
        written=("out",),
        width=0,
    )
    four = "z0 z1 v_uncond v_cond"
    return [
        latent("z1 drawn", "fp32", "bf16", "z0 v_uncond v_cond", "z1"),
        latent("four sources", "fp32", "bf16", four),
        latent("bf16 sources", "bf16", "bf16", four),
        latent("six sources", "fp32", "bf16", " ".join(SOURCES)),
        latent("three drawn", "fp32", "bf16", "z0 v_uncond v_cond", "z1 eps z1_aux"),
        latent("fp32 states", "fp32", "fp32", "z0 v_uncond v_cond", "z1"),
        tokens,
    ]


def correction_loss() -> list[Variant]:
    """The wired form: float32 velocity, z1 drawn."""

    def loss(name: str, velocity: str, given: str, drawn: str = "", learn: bool = True) -> Variant:
        tensors = {"velocity": velocity, "gradient": velocity if learn else None, "partial": "fp32"}
        return Variant(
            name=f"correction_loss {name}",
            module="correction_loss",
            kernel="correction_loss_kernel",
            pointers=_sources(given, "fp32") | {"groups": "i64", "points": "fp32"} | tensors,
            integers=("size",),
            constants=_draws(drawn) | {"BLOCK": 1024},
            num_warps=4 if velocity == "bf16" else 8,
            read=(*SOURCES, "velocity"),
            written=("gradient",),
        )

    return [
        loss("z1 drawn", "fp32", "z0 v_uncond v_cond", "z1"),
        loss("four sources", "fp32", "z0 z1 v_uncond v_cond"),
        loss("bf16 velocity", "bf16", "z0 v_uncond v_cond", "z1"),
        loss("three drawn", "fp32", "z0 v_uncond v_cond", "z1 eps z1_aux"),
        loss("no gradient", "fp32", "z0 v_uncond v_cond", "z1", learn=False),
    ]


def adaln() -> list[Variant]:
    """At the hidden sizes of SD3.5-M, SD3.5-L and FLUX. What a program adds up for the vectors is not a stream."""

    def one(direction: str, hidden_size: int, branch: bool, kind: str = "bf16") -> Variant:
        absent = set() if branch else {"branch", "bias", "gate", "grad_branch"}
        forward = direction == "forward"
        read: tuple[str, ...]
        if forward:
            read, written = ("residual", "branch"), ("hidden", "modulated")
            absent |= set() if branch else {"hidden"}
        else:
            read = ("grad_hidden", "grad_modulated", "hidden", "branch")
            written = ("grad_residual", "grad_branch")
        width = power_of_two(hidden_size)
        launch = launch_of("adaln", f"{direction} {width}", "any")
        pointers = {*read, *written, "bias", "gate", "scale", *(("shift",) if forward else ())}
        return Variant(
            name=f"adaln {direction} {hidden_size}{'' if branch else ', no branch'}, {kind}",
            module="adaln",
            kernel=f"adaln_{direction}_kernel",
            pointers={name: None if name in absent else kind for name in sorted(pointers)}
            | {"statistics": "fp32", "partials": "fp32", "bias_sums": "fp32" if branch else None},
            integers=("tokens", "samples", "gate_stride", "shift_stride", "scale_stride"),
            constants={"H": hidden_size, "WIDTH": width} | ({"ROWS": launch.block} if forward else {}),
            num_warps=min(32, launch.num_warps * WIDTHS[kind] // 2),
            read=read,
            written=written,
            registers=ADALN_REGISTERS[direction, width],
        )

    return [
        *(
            one(way, size, branch)
            for way in ("forward", "backward")
            for size in (1536, 2432, 3072)
            for branch in (True, False)
        ),
        *(one(way, 1536, True, "fp32") for way in ("forward", "backward")),
    ]


def qk_norm_rope() -> list[Variant]:
    """SD3.5's heads without, FLUX's with the rotary embedding; a dual attention of a model without QK norm."""

    def one(direction: str, head_size: int, has: str, kind: str = "bf16") -> Variant:
        rotary, bias, norm = "rotary" in has, "bias" in has, "norm" in has
        launch = launch_of("qk_norm_rope", f"{direction} rotary" if rotary else direction, "any")
        lines = launch.block // head_size
        forward = direction == "forward"
        parts = ("query", "key", "value")
        gradients = tuple(f"grad_{part}" for part in parts)
        # an element of a head is three of `mixed`; backward reads queries and keys again where there is a norm
        read = ("mixed",) * 3 if forward else (*gradients, *(("mixed",) * 2 if norm else ()))
        written = parts if forward else ("grad_mixed",) * 3
        optional = {"bias": bias, "query_weight": norm, "key_weight": norm}
        sums = {"bias_sums": bias, "weight_sums": norm} | dict.fromkeys(("cosine", "sine"), rotary)
        pointers: dict[str, str | None] = dict.fromkeys(("mixed", *read, *written), kind)
        pointers |= {name: kind if there else None for name, there in optional.items()}
        pointers |= {name: "fp32" if there else None for name, there in sums.items()}
        heads = min(HEADS, lines)
        tile: dict[str, object] = {"ROWS": lines // heads, "HEADS": heads}
        if forward:
            tile = {"LINES": lines}
        return Variant(
            name=f"qk_norm_rope {direction} {head_size}, {has or 'copied'}, {kind}",
            module="qk_norm_rope",
            kernel=f"qk_norm_{direction}_kernel",
            pointers=pointers,
            integers=(
                "lines", "rows", "samples", "heads",
                "token_stride", "sample_stride", "head_stride",
            ),
            constants={"D": head_size, "WIDTH": head_size} | tile,
            num_warps=launch.num_warps,
            read=read,
            written=written,
            width=128 if forward and not rotary else 64,
            registers=MOST_REGISTERS if forward else TWO_PROGRAMS,
        )  # fmt: skip

    ways = ("forward", "backward")
    return [
        *(one(way, 64, "bias norm") for way in ways),
        *(one(way, 64, "norm") for way in ways),
        *(one(way, 64, "") for way in ways),
        *(one(way, 128, "bias norm rotary") for way in ways),
        *(one(way, 64, "bias norm", "fp32") for way in ways),
    ]


def bias_gelu() -> list[Variant]:
    """Between the two linears of an MLP; without a bias where the linear has added it."""

    def one(direction: str, bias: bool, kind: str = "bf16") -> Variant:
        launch = launch_of("bias_gelu", "16 bit" if kind == "bf16" else "32 bit", "any")
        forward = direction == "forward"
        read, written = (("x",), ("out",)) if forward else (("grad_out", "x"), ("grad_x",))
        pointers: dict[str, str | None] = dict.fromkeys((*read, *written), kind)
        return Variant(
            name=f"bias_gelu {direction}{'' if bias else ', no bias'}, {kind}",
            module="bias_gelu",
            kernel=f"bias_gelu_{direction}_kernel",
            pointers=pointers | {"bias": kind if bias else None, "sums": "fp32" if bias else None},
            integers=("rows", "each", "F"),
            constants={"BLOCK": launch.block},
            num_warps=launch.num_warps,
            read=read,
            written=written,
        )

    ways = ("forward", "backward")
    return [
        *(one(way, bias) for way in ways for bias in (True, False)),
        *(one(way, True, "fp32") for way in ways),
    ]


def gated_add() -> list[Variant]:
    """Behind each MLP and the image's own attention; without a bias where the linear has added it."""

    def one(direction: str, bias: bool, kind: str = "bf16") -> Variant:
        launch = launch_of("gated_add", "16 bit" if kind == "bf16" else "32 bit", "any")
        forward = direction == "forward"
        read, written = (
            (("residual", "branch"), ("out",)) if forward else (("grad_out", "branch"), ("grad_branch",))
        )
        pointers: dict[str, str | None] = dict.fromkeys((*read, *written, "gate"), kind)
        return Variant(
            name=f"gated_add {direction}{'' if bias else ', no bias'}, {kind}",
            module="gated_add",
            kernel=f"gated_add_{direction}_kernel",
            pointers=pointers
            | {"bias": kind if bias else None, "gate_sums": "fp32", "bias_sums": "fp32" if bias else None},
            integers=("tokens", "samples", "each", "H", "gate_stride"),
            constants={"BLOCK": launch.block},
            num_warps=launch.num_warps,
            read=read,
            written=written,
        )

    ways = ("forward", "backward")
    return [
        *(one(way, bias) for way in ways for bias in (True, False)),
        *(one(way, True, "fp32") for way in ways),
    ]


def sums() -> list[Variant]:
    """The second half of the gradients of vectors, weights and biases."""
    launch = launch_of("sum_lines", "columns", "any")
    kinds = {"": "fp32", "_sum": "bf16"}
    return [
        Variant(
            name=f"{' and '.join(given)} of partial sums, bf16",
            module="sums",
            kernel="sum_kernel",
            pointers={
                f"{which}{part}": kind if which in given else None
                for which in ("first", "second")
                for part, kind in kinds.items()
            },
            integers=("first_lines", "first_size", "second_lines", "second_size"),
            constants={"LINES": LINES, "BLOCK": launch.block},
            num_warps=launch.num_warps,
            read=given,
            written=tuple(f"{which}_sum" for which in given),
            width=0,
        )
        for given in (("first",), ("first", "second"))
    ]


def _sources(given: str, kind: str) -> dict[str, str | None]:
    return {name: kind if name in given.split() else None for name in SOURCES}


def _draws(drawn: str) -> dict[str, object]:
    return {f"DRAW_{name.upper()}": name in drawn.split() for name in ("z1", "eps", "z1_aux")}


def all_variants() -> list[Variant]:
    """Of every operation."""
    return [
        *rollout_renoise(),
        *correction_loss(),
        *adaln(),
        *qk_norm_rope(),
        *bias_gelu(),
        *gated_add(),
        *sums(),
    ]
