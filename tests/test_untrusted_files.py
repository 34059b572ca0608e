"""What a file from elsewhere could do to who reads it: no code of it is run, and nothing of it is unpacked."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for place in ("soar_mega", "kernels", "tools") for path in (ROOT / place).rglob("*.py")
                 if "soar_mega/kernels/" not in path.as_posix())  # fmt: skip
# modules and functions that run what they read
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNS_OR_UNPACKS = {"extract", "extractall", "unpack_archive", "_extract_member"}
ALLOWED = {"pickle.UnpicklingError"}  # a name to catch, not to load with


def faults(source: str) -> list[str]:
    """What in a source could unpickle or unpack, by line."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LOADERS:
            found.append(f"{node.lineno}: from {node.module} import")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in LOADERS:
            name = f"{node.value.id}.{node.attr}"
            found += [] if name in ALLOWED else [f"{node.lineno}: {name}"]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        name = ast.unparse(call.func)
        if name == "torch.load" and words.get("weights_only") != "True":
            found.append(f"{call.lineno}: torch.load without weights_only=True")
        if words.get("allow_pickle", "False") != "False":
            found.append(f"{call.lineno}: {name} with allow_pickle")
        if words.get("trust_remote_code", "False") != "False":
            found.append(f"{call.lineno}: {name} with trust_remote_code")
        if name.split(".")[-1] in RUNS_OR_UNPACKS:
            found.append(f"{call.lineno}: {name}")
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load") and "Loader" not in words:
            found.append(f"{call.lineno}: {name} without a safe Loader")
    return found


def test_no_source_unpickles_or_unpacks() -> None:
    assert len(SOURCES) > 200
    found = {path.relative_to(ROOT).as_posix(): faults(path.read_text()) for path in SOURCES}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "tar.extractall()",
        "shutil.unpack_archive(path)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "yaml.load(text)",
    ],
)
def test_each_way_of_it_is_seen(source: str) -> None:
    assert faults(source)
