"""The Dockerfile's COPY and RUN steps, walked in an empty folder: what an image has beside them comes from here."""

import fnmatch
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# a program that asks for it finds a CUDA build of torch
CUDA_BUILD = """\
import sys
if any("torch.version.cuda" in word for word in sys.orig_argv):
    import torch
    torch.version.cuda = "13.0"
"""


def instructions(text: str) -> list[tuple[str, str]]:
    """(FROM, ...), (COPY, ...): continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


def is_ignored(path: Path) -> bool:
    """Whether .dockerignore keeps a path out of the build."""
    patterns = (ROOT / ".dockerignore").read_text().split()
    relative = f"/{path.relative_to(ROOT).as_posix()}"
    return any(fnmatch.fnmatch(relative, f"/{pattern}".replace("/**/", "*/")) for pattern in patterns)


def copy(words: list[str], place: Path) -> None:
    """COPY of files, or of all that is not ignored."""
    *sources, target = words
    for source in sources:
        if source == ".":
            shutil.copytree(
                ROOT,
                place / target,
                ignore=lambda folder, names: {name for name in names if is_ignored(Path(folder, name))},
                dirs_exist_ok=True,
            )
            continue
        assert not is_ignored(ROOT / source), f"COPY {source}: .dockerignore names it"
        to = place / target / Path(source).name if target.endswith("/") else place / target
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / source, to)


@pytest.fixture
def image(tmp_path: Path) -> dict[str, str]:
    """The environment of an image: the packages of this one, in a Python that can be installed into."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "usr"], check=True)
    (packages,) = (tmp_path / "usr").glob("lib/python*/site-packages")
    # a plain line: the packages here are found, and what an editable install left here is not
    (packages / "image.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    (packages / "sitecustomize.py").write_text(CUDA_BUILD)
    program = tmp_path / "usr" / "bin" / "pip"
    program.write_text('#!/bin/sh\nexec python -m pip "$@"\n')
    program.chmod(0o755)
    # no downloads: that the dependencies are there is the registry's part
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    path = f"{tmp_path / 'usr' / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(tmp_path)} | offline


def test_every_step_of_the_dockerfile_succeeds(tmp_path: Path, image: dict[str, str]) -> None:
    place, environment = tmp_path, image
    for instruction, rest in instructions((ROOT / "Dockerfile").read_text()):
        rest = rest.replace("/opt/", f"{tmp_path}/opt/")
        if instruction == "WORKDIR":
            place = Path(rest)
            place.mkdir(parents=True)
        elif instruction == "ENV":
            environment |= dict([rest.split("=", 1)])
        elif instruction == "COPY":
            copy(rest.split(), place)
        elif instruction == "RUN":
            done = subprocess.run(
                rest, shell=True, cwd=place, env=environment, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, f"RUN {rest}\n{done.stdout}{done.stderr}"
        elif instruction == "ENTRYPOINT":
            words = [word.strip('" ') for word in rest.strip("[]").split(",")]
            told = subprocess.run(
                [*words, "--help"], cwd="/", env=environment, capture_output=True, text=True
            )
            assert told.returncode == 0 and "doctor" in told.stdout, told.stderr
        else:
            assert instruction in ("ARG", "FROM")
    assert (place / "kernels" / "source").is_dir() and not (place / ".git").exists()
