"""What the compiler makes of the kernels for GPUs that are not there, in processes without the interpreter."""

import dataclasses
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

from soar_mega.kernels import aot, variants

ROOT = Path(__file__).parents[2]
GOOD = aot.Resources(registers=48, stack=0, spills=0, shared=0, loads={128: 8, 32: 4}, stores={128: 1})


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


def check(python: str, *architectures: str) -> str:
    done = run(python, "-m", "soar_mega.kernels.aot", "--check", *architectures)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_variant_keeps_its_limits_on_hopper():
    table = check(sys.executable, "sm_90")
    assert table.count(" sm_90 ") == len(variants.all_variants())


def test_a_kernel_keeps_its_limits_on_hopper():
    """One of them; the slow tests compile all."""
    code = """
from soar_mega.kernels import aot, variants
for variant in variants.rollout_renoise()[:1]:
    found = aot.broken_limits(variant, aot.compile_variant(variant, "sm_90"))
    assert not found, found
print("compiled")
"""
    done = run(sys.executable, "-c", code)
    assert done.stdout == "compiled\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spills": 4}, "4 spills"),
        ({"registers": 65}, "65 registers"),
        ({"loads": {128: 2, 64: 8}}, "128-bit loads"),
        ({"stores": {64: 2}}, "128-bit stores"),
    ],
)
def test_a_broken_limit_is_named(change, problem):
    variant = variants.rollout_renoise()[0]
    assert aot.broken_limits(variant, GOOD) == []
    (found,) = aot.broken_limits(variant, dataclasses.replace(GOOD, **change))
    assert problem in found


def test_widths_are_read_from_the_disassembly():
    code = "LDG.E.128.CONSTANT R4; LDG.E R1, [R2]; @!P0 LDG.E.U16 R1, [R2]; STG.E.64 [R2], R4; LDGSTS.E.64 [R5], [R2]"
    assert aot._widths(code, aot.LOADS) == {128: 1, 64: 1, 32: 1, 16: 1}
    assert aot._widths(code, "STG") == {64: 1}


@pytest.mark.slow
def test_every_variant_keeps_its_limits_on_blackwell():
    check(sys.executable, "sm_100")


@pytest.mark.slow
def test_the_oldest_supported_triton(tmp_path):
    """Triton 3.6.0 in an environment of its own that borrows nearly everything else: interpreted tests and compilation.

    Its interpreter turns arrays of one element into loop bounds, which NumPy refuses from 2.4 on.
    """
    folder = tmp_path / "triton36"
    assert run(sys.executable, "-m", "venv", str(folder)).returncode == 0
    python = str(folder / "bin" / "python")
    done = run(python, "-m", "pip", "install", "--quiet", "--no-deps", "triton==3.6.0", "numpy==2.3.5")
    if done.returncode:
        pytest.skip(f"triton 3.6.0 and numpy 2.3.5 could not be installed: {done.stderr[-300:]}")
    (own,) = (folder / "lib").glob("python*/site-packages")
    borrowed = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (own / "borrowed.pth").write_text(
        "".join(f"import site; site.addsitedir({path!r})\n" for path in borrowed)
    )
    assert run(python, "-c", "import triton; print(triton.__version__)").stdout.strip() == "3.6.0"
    check(python, "sm_90")  # for sm_100 its ptxas spills one word of a stochastic variant
    tests = run(python, "-m", "pytest", "-q", "-x", "tests/kernels")
    assert tests.returncode == 0, tests.stdout[-5000:]
