"""Which files of a diffusers model folder hold its weights: one or several with an index, and variants of them.

A variant, such as fp16, has its name before the ending: diffusion_pytorch_model.fp16.safetensors.
"""

from pathlib import Path

from soar_mega.user_files import read_object

STEM, ENDING = "diffusion_pytorch_model", ".safetensors"
SINGLE = f"{STEM}{ENDING}"
INDEX = f"{SINGLE}.index.json"


def single_name(variant: str = "") -> str:
    """The name of weights in one file."""
    return f"{STEM}.{variant}{ENDING}" if variant else SINGLE


def index_name(variant: str = "") -> str:
    """The name of the index of weights in several files."""
    return f"{SINGLE}.index.{variant}.json" if variant else INDEX


def shard_name(variant: str, number: int, count: int) -> str:
    """The name of one of several files."""
    return f"{single_name(variant).removesuffix(ENDING)}-{number + 1:05d}-of-{count:05d}{ENDING}"


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that a model folder means, or one file, or an index.

    Of a folder the weights without a variant, or else its only variant.

    Raises:
        ValueError: there are none, or several and none of them is the one without a variant; an index that is none.
    """
    if path.is_file():
        return _indexed(path) if path.suffix == ".json" else [path]
    plain = [path / name for name in (SINGLE, INDEX) if (path / name).is_file()]
    found = plain or _variants(path)
    if len(plain) == 2:
        raise ValueError(
            f"{path} holds weights twice, {SINGLE} and {INDEX}: remove the one that is not meant, which another "
            "program may load"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(
            f"{path} holds several variants of its weights and none without a variant: name one of {names}"
        )
    if not found:
        names = ", ".join(sorted(p.name for p in path.iterdir())) if path.is_dir() else "no such folder"
        raise ValueError(f"{path} holds neither {SINGLE} nor {INDEX} (found: {names})")
    return weight_files(found[0])


def _variants(folder: Path) -> list[Path]:
    singles = [file for file in folder.glob(f"{STEM}.*{ENDING}") if "-of-" not in file.name]
    return sorted(singles) + sorted(folder.glob(f"{SINGLE}.index.*.json"))


def _indexed(index: Path) -> list[Path]:
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} is not an index of safetensors files: it has no weight_map")
    for key, name in listed.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} says that {key} is in {name!r}, which is no file beside it")
    return [index.parent / name for name in sorted(set(listed.values()))]
