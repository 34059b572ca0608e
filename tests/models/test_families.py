"""Families are found by their folders, and nothing outside one names it."""

import ast
import json
from pathlib import Path

import pytest

from soar_mega.config import ModelConfig
from soar_mega.models.family import families, find_sizes, model_sizes, presets, read_sizes

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "soar_mega" / "models"
FOLDERS = sorted(path.parent.name for path in MODELS.glob("*/__init__.py") if path.parent.name != "common")


def names_in(source: str) -> set[str]:
    """The modules that a file imports, wherever in it, and those of whose parts it imports some."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def of_family(modules: set[str], family: str) -> set[str]:
    package = f"soar_mega.models.{family}"
    return {name for name in modules if name == package or name.startswith(f"{package}.")}


def test_no_file_outside_a_familys_folder_imports_it():
    assert FOLDERS
    files = [path for folder in ("soar_mega", "kernels", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    for path in files:
        for family in FOLDERS:
            if path.parent != MODELS / family:
                imported = of_family(names_in(path.read_text()), family)
                assert not imported, f"{path} imports {sorted(imported)}: ask the family of the model's sizes"


@pytest.mark.parametrize(
    "line",
    [
        "from soar_mega.models import sd3",
        "import soar_mega.models.sd3.sizes",
        "def f():\n    from soar_mega.models.sd3.work import layer_work",
    ],
)
def test_such_an_import_is_seen(line):
    assert of_family(names_in(line), "sd3")


def test_each_folder_is_a_family_with_sizes_of_its_own():
    assert sorted(family.name for family in families().values()) == FOLDERS
    for name, sizes in presets().items():
        assert families()[sizes.to_diffusers()["_class_name"]] is sizes.family
        assert read_sizes(sizes.to_diffusers()) == sizes == find_sizes(name)
        assert hash(sizes) == hash(read_sizes(sizes.to_diffusers()))


@pytest.mark.parametrize("content", [{}, {"_class_name": "UNet2DConditionModel"}])
def test_a_transformer_of_no_family_is_refused_with_those_that_there_are(content):
    with pytest.raises(ValueError, match="describes a .*supported are .*SD3Transformer2DModel"):
        read_sizes(content)


def test_a_model_whose_output_is_no_velocity_of_its_latents_is_not_trained(tmp_path):
    sizes = presets()["sd35_medium"].to_diffusers()
    for changes in ({"in_channels": 33}, {"out_channels": 32}):
        (tmp_path / "config.json").write_text(json.dumps(sizes | changes))
        with pytest.raises(
            ValueError, match="in_channels .* and out_channels .*: a model .* cannot be trained"
        ):
            model_sizes(ModelConfig(pipeline_dir=str(tmp_path)))
