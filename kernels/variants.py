"""The specialisations of the kernels that training launches: what is compiled ahead of time, and what it moves.

A variant names an operation's Triton source and the types of its arguments as a launch passes them. Sizes are those of
SD3.5 at 512 px where the source needs one at compile time.
"""

from dataclasses import dataclass

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2, "i64": 8}
SOURCES = ("z0", "z1", "v_uncond", "v_cond", "eps", "z1_aux")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """pointers: argument -> element type; None where the tensor is absent. integers: arguments that are sizes.

    read, written: the pointers whose elements are streamed, for the byte counts. latent: a kernel in the layout of the
    latents, where the limits on registers and on the width of loads and stores are asserted.
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
    latent: bool = True

    def bytes_read(self) -> int:
        """Per element of a sample (per element of a point for the velocity)."""
        return self._bytes(self.read)

    def bytes_written(self) -> int:
        """Per element of a point."""
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
            kernel="latent_kernel",
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
        kernel="tokens_kernel",
        pointers=_sources("z0 v_uncond v_cond", "fp32") | {"groups": "i64", "points": "fp32", "out": "bf16"},
        integers=("height", "width"),
        constants=_draws("z1") | {"CHANNELS": 16, "CHANNELS_TILE": 16, "PATCH": 2, "WIDTH_TILE": 32},
        read=SOURCES,
        written=("out",),
        latent=False,
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
            kernel="loss_kernel",
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


def _sources(given: str, kind: str) -> dict[str, str | None]:
    return {name: kind if name in given.split() else None for name in SOURCES}


def _draws(drawn: str) -> dict[str, object]:
    return {f"DRAW_{name.upper()}": name in drawn.split() for name in ("z1", "eps", "z1_aux")}


def all_variants() -> list[Variant]:
    """Of every operation."""
    return [*rollout_renoise(), *correction_loss()]
