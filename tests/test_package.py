"""The package as installed: names, the mapped kernels folder, the promise of cheap imports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import soar_mega.kernels

ROOT = Path(__file__).parent.parent


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_kernels_folder_is_soar_mega_kernels(tmp_path: Path) -> None:
    assert soar_mega.kernels.__file__ is not None
    assert Path(soar_mega.kernels.__file__).parent == ROOT / "kernels"
    elsewhere = run_python("import soar_mega.kernels", tmp_path)  # not because the root is on sys.path
    assert elsewhere.returncode == 0, elsewhere.stderr


@pytest.mark.parametrize(
    "statement", ["from kernels import get_kernel", "import kernels; kernels.get_kernel"]
)
def test_bare_kernels_refuses(statement: str) -> None:
    result = run_python(statement, ROOT)
    assert result.returncode == 1
    assert "ImportError" in result.stderr and "soar_mega.kernels" in result.stderr


def test_the_library_called_kernels_looks_absent_from_the_root() -> None:
    """transformers and diffusers, started in the repository's root, must not take the folder for that library."""
    result = run_python(
        "from transformers.utils.import_utils import is_kernels_available as one\n"
        "from diffusers.utils import is_kernels_available as two\n"
        "import sys; sys.exit(10 * one() + two())",
        ROOT,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "act",
    [
        "build_parser()",
        "main(['convert', 'no', 'out'])",
        "main(['evaluate', 'no'])",
        "main(['train', 'recipes/tiny/soar.yaml', 'train.sede=1'])",
    ],
)
def test_the_command_imports_nothing_heavy_for_its_first_words(act: str) -> None:
    """--help answers at once, and so does who hears that a path or a recipe is wrong."""
    result = run_python(
        "import sys, soar_mega.cli, soar_mega.__main__\n"
        f"soar_mega.cli.{act}\n"
        "print(*{'torch', 'numpy', 'megatron', 'diffusers', 'transformers'} & set(sys.modules))",
        ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stdout.split()


def test_every_folder_of_the_package_is_packaged() -> None:
    for path in (ROOT / "soar_mega").rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), (
            f"{path.parent} has no __init__.py: setup.py would leave it out"
        )


def test_constraints_pin_every_requirement() -> None:
    def names(text: str) -> set[str]:
        return {re.split(r"[\[<>=!~ ;]", line)[0].lower().replace("_", "-") for line in text.splitlines()}

    pinned = names((ROOT / "constraints.txt").read_text())
    required = re.findall(r'"([\w-]+)[^"]*"', re.sub(r"#.*", "", (ROOT / "setup.py").read_text()))
    wanted = required[required.index("torch") : required.index("gpu")] + ["scikit-learn", "matplotlib"]
    missing = {name.lower() for name in wanted if name not in ("dev", "digits")} - pinned
    assert not missing, f"constraints.txt does not pin {sorted(missing)}"


def test_no_address_of_a_package_registry() -> None:
    for name in ("constraints.txt", "setup.py", "pyproject.toml", "Makefile", "Dockerfile", "README.md"):
        assert not re.search(
            r"index-url|find-links|https?://\S*(pypi|simple/|whl)", (ROOT / name).read_text()
        ), name


def test_names_of_test_files_are_unique() -> None:
    """pytest imports them by their base name; two of one name stop the whole run."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
