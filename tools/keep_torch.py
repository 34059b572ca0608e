"""Print constraints that keep the torch at hand and everything compiled against it.

An NVIDIA image, or a user's own CUDA environment, comes with a torch that must not be replaced. pip freeze is no
help there: it names local files for packages that were built in place.
"""

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
    print("\n".join(f"{name}=={version}" for name, version in sorted(found.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
