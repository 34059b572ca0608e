"""Print constraints that keep the torch at hand and everything compiled against it.

An NVIDIA image, or a user's own CUDA environment, comes with a torch that must not be replaced. pip freeze is no
help there: it names local files for packages that were built in place.

NumPy stays too, but for one pair: triton 3.6 cannot interpret kernels with NumPy 2.4 or newer.
"""

import re
import sys
from importlib.metadata import distributions

KEEP = ("torch", "torchvision", "torchaudio", "triton", "pytorch-triton", "flash-attn", "numpy")
KEEP_PREFIXES = ("nvidia-", "transformer-engine")


def main() -> int:
    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"].lower().replace("_", "-")
        if name in KEEP or name.startswith(KEEP_PREFIXES):
            found.setdefault(name, distribution.version)
    if "torch" not in found:
        print(
            f"{sys.executable} has no torch: install one first, or use `make` without SOAR_PYTHON",
            file=sys.stderr,
        )
        return 1
    print("\n".join(constraints(found)))
    return 0


def constraints(found: dict[str, str]) -> list[str]:
    """Lines for pip, from versions by name."""
    kept = {name: f"=={version}" for name, version in found.items()}
    triton = found.get("triton", found.get("pytorch-triton", "3.7"))
    if _release(triton) < (3, 7) and _release(found.get("numpy", "2.4")) >= (2, 4):
        kept["numpy"] = "<2.4"
    return [f"{name}{version}" for name, version in sorted(kept.items())]


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


if __name__ == "__main__":
    sys.exit(main())
