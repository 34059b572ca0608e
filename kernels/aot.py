"""Compiles every kernel for a GPU that need not be there, and says what the compiler made of it.

    python -m soar_mega.kernels.aot                   sm_90 and sm_100, a table
    python -m soar_mega.kernels.aot --check sm_90     fails where a limit is broken

The process must not have TRITON_INTERPRET set. Registers, stack and shared memory come from the cubin's resource usage;
spills are the loads and stores of local memory in its disassembly, and widths are those of its global ones.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.kernels.variants import Variant, all_variants

MOST_SPILLS = (
    2  # instructions: Triton 3.8 has one value of adaln's backward pass wait in memory, 3.6 and 3.7 none
)
ARCHITECTURES = ("sm_90", "sm_100")
LOADS = "LDG(?:STS)?"  # from global memory into registers, or into shared memory for later


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs. Widths: bits of an instruction -> how many of them the program has."""

    registers: int
    stack: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]


def compile_variant(variant: Variant, architecture: str) -> Resources:
    """Compiles for an architecture such as "sm_90", every pointer and size divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"soar_mega.kernels.source.{variant.module}")
    kernel = getattr(module, variant.kernel)
    signature: dict[str, str] = {}
    constants: dict[Any, object] = {}
    attributes: dict[Any, object] = {}
    for i, name in enumerate(kernel.arg_names):
        pointer = variant.pointers.get(name)
        if pointer is not None:
            signature[name] = f"*{pointer}"
        elif name in variant.integers:
            signature[name] = "i32"
        elif name in variant.pointers or name in variant.constants:
            signature[name] = "constexpr"
            constants[(i,)] = variant.constants.get(name)
            continue
        else:
            signature[name] = "fp32"
            continue
        attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": variant.num_warps})
    return read_cubin(compiled.asm["cubin"])


def read_cubin(cubin: bytes) -> Resources:
    """What the tools that Triton ships say of a compiled program."""
    usage = _tool("cuobjdump", cubin, "-res-usage")
    code = _tool("nvdisasm", cubin)
    found = {key: int(number) for key, number in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    return Resources(
        registers=found["REG"],
        stack=found["STACK"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=found["SHARED"],
        loads=_widths(code, LOADS),
        stores=_widths(code, "STG"),
    )


def broken_limits(variant: Variant, found: Resources) -> list[str]:
    """What a compiled variant must not do; empty when all is well."""
    problems = [f"{found.spills} spills"] if found.spills > MOST_SPILLS else []
    if found.registers > variant.registers:
        problems.append(f"{found.registers} registers, more than {variant.registers}")
    if not variant.width:
        return problems
    for kind, widths, names in (
        ("loads", found.loads, variant.read),
        ("stores", found.stores, variant.written),
    ):
        streams = [name for name in names if variant.pointers[name] is not None]
        wide = sum(count for width, count in widths.items() if width >= variant.width)
        if wide < len(streams):
            problems.append(f"{variant.width}-bit {kind}: {wide} for {len(streams)} tensors")
    return problems


def table(results: list[tuple[Variant, str, Resources]]) -> str:
    """One line per variant and architecture."""
    head = f"{'variant':42} {'arch':7} {'regs':>4} {'stack':>5} {'spills':>6} {'smem':>6}  {'loads':20} {'stores':16}"
    lines = [f"{head} {'B read':>6} {'B written':>9}"]
    for variant, architecture, r in results:
        lines.append(
            f"{variant.name:42} {architecture:7} {r.registers:4d} {r.stack:5d} {r.spills:6d} {r.shared:6d}  "
            f"{_counts(r.loads):20} {_counts(r.stores):16} {variant.bytes_read():6d} {variant.bytes_written():9d}"
        )
    lines.append(
        "loads, stores: bits x instructions. Bytes per element of a sample (read) and of a point (written)."
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compiles, prints, and with --check returns 1 where a limit is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "architectures", nargs="*", default=ARCHITECTURES, help="such as sm_90 (default: sm_90 sm_100)"
    )
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--check", action="store_true", help="fail where a limit is broken")
    options = parser.parse_args(arguments)
    chosen = [variant for variant in all_variants() if options.only in variant.name]
    results = [(v, arch, compile_variant(v, arch)) for v in chosen for arch in options.architectures]
    sys.stdout.write(table(results) + "\n")
    problems = [f"{v.name} on {arch}: {p}" for v, arch, r in results for p in broken_limits(v, r)]
    if options.check and problems:
        sys.stderr.write("\n".join(problems) + "\n")
        return 1
    return 0


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """The output of a tool that comes with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [path, *options, file.name], capture_output=True, text=True, check=True, timeout=60
        ).stdout


def _widths(code: str, instruction: str) -> dict[int, int]:
    """Bits of each global load or store: LDG.E is 32 wide, LDG.E.U16 16, LDG.E.128 128."""
    kinds = re.findall(rf"\b{instruction}\b((?:\.\w+)*)", code)
    widths = (re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", kind) for kind in kinds)
    return dict(sorted(Counter(int(width[1]) if width else 32 for width in widths).items(), reverse=True))


def _counts(widths: dict[int, int]) -> str:
    return " ".join(f"{bits}x{count}" for bits, count in widths.items())


if __name__ == "__main__":
    sys.exit(main())
