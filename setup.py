"""soar_mega: SOAR post-training of rectified-flow transformers on megatron-core."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (ROOT / "soar_mega/__init__.py").read_text(), re.MULTILINE)
assert version, "soar_mega/__init__.py states no __version__"

DIGITS = ["scikit-learn>=1.5", "matplotlib>=3.9"]

setup(
    name="soar_mega",
    version=version.group(1),
    description="SOAR post-training of rectified-flow transformers on megatron-core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ and examples/ stand at the top level of the repository and are imported as soar_mega.kernels and
    # soar_mega.examples. Folders are looked for, not named: the Docker image installs the dependencies before the
    # sources are there.
    package_dir={"soar_mega.kernels": "kernels", "soar_mega.examples": "examples"},
    packages=[
        *find_packages(include=["soar_mega", "soar_mega.*"]),
        *(
            f"soar_mega.{name}"
            for name in find_packages(include=["kernels", "kernels.*", "examples", "examples.*"])
        ),
    ],
    install_requires=[
        "torch>=2.11.0a0",  # the pre-release number lets in the builds of NVIDIA's images
        # CUDA builds of torch bring their own; only launches import it. 3.6 cannot interpret with NumPy 2.4 or newer:
        # tools/keep_torch.py and `soar-mega doctor` know that pair, which no requirement can exclude
        "triton>=3.6; platform_system == 'Linux'",
        "megatron-core==0.16.1; python_version < '3.12'",  # the newest one for Python 3.11
        # 0.19 announces that the asynchronous save will go, on which soar_mega/checkpoints/rank_file.py stands
        "megatron-core>=0.16.1,<0.20; python_version >= '3.12'",
        "deepspeed==0.19.8",
        "psutil",  # megatron-core needs it to save a checkpoint and does not say so
        "diffusers>=0.36,<1",  # 0.42 announces that 1.0 takes no torch_dtype
        "peft>=0.17",  # diffusers loads adapters with it
        "transformers>=5.0",
        "accelerate>=1.0",
        "sentencepiece",
        "safetensors>=0.5",
        "webdataset>=1.0",
        "fsspec",
        "braceexpand",
        "numpy>=2.0",
        "packaging>=24",
        "pillow>=11",
        "pyyaml>=6.0",
        "scipy>=1.13",
        "tensorboard>=2.18",
        "tqdm>=4.66",
    ],
    extras_require={
        # The built-in canvases with their verifier, and the figures of the demo, of studies and of benchmarks.
        "digits": DIGITS,
        "dev": [
            *DIGITS,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
        ],
        # Compiled against the torch at hand: see the Dockerfile.
        "gpu": ["transformer-engine[pytorch]>=2.9,<2.13", "flash-attn>=2.7"],
        # What some scorers of an evaluation need beside the rest; the others need nothing (docs/scorers.md).
        "evaluation": ["rapidocr>=3.10,<4", "onnxruntime>=1.20", "torch-fidelity>=0.4", "torchvision"],
    },
    entry_points={"console_scripts": ["soar-mega=soar_mega.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
