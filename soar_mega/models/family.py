"""The families of transformers: what each must provide, and which there are.

A family is a folder of this one whose package has a FAMILY. Nothing outside it names it: the rest of the program goes
from a configuration to its sizes, and from sizes to their family (docs/adding_a_model.md).
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soar_mega import models
from soar_mega.config import ModelConfig
from soar_mega.models.common.flops import Tokens, Work
from soar_mega.models.common.original_layout import OriginalLayout
from soar_mega.models.common.rank_tokens import RankTokens
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.common.tensor_map import Entry
from soar_mega.user_files import read_object

if TYPE_CHECKING:
    from soar_mega.data.encoder_facts import EncoderFacts
    from soar_mega.models.common.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Family:
    """All in which one architecture differs from the others. Functions get the sizes first, where not said otherwise.

    Attributes:
        name: of its folder.
        class_name: diffusers' name of the transformer.
        products: what is sold under it, for messages.
        presets: published sizes by name.
        read_sizes: a config.json's content and its name -> sizes; ValueError where they cannot be.
        narrowed: sizes with as many layers and heads, for a try on a laptop.
        transformer: -> the class of its models. A call, because megatron takes seconds to import.
        entries: all tensors of a model.
        usual_tokens: of a sample, by whose work pipeline stages are cut.
        text_tokens: of a prompt, as our recipes have them prepared.
        embedding_work: of the inputs on their way into the layers, in a forward of one sample.
        layer_work: (number, tokens) of one layer, likewise.
        layer_bytes: (tokens, number, bytes of an element, parts not kept) that autograd keeps of a layer for one
            point.
        embedding_bytes: (latent size, text length, bytes of an element) that it keeps of what comes before the layers.
        encoder_facts: (pipeline folder, T5 tokens or None), no sizes -> what its encoders make; ValueError: damaged.
        samples_evenly: its pipeline's sampler takes steps of equal unshifted time (`Spacing`).
        original: the layout of its authors' single files; None where there are none.
    """

    name: str
    class_name: str
    products: str
    presets: Mapping[str, Any]
    read_sizes: Callable[[dict[str, Any], str], Any]
    narrowed: Callable[[Any], Any]
    transformer: Callable[[], "type[Transformer]"]
    entries: Callable[[Any], list[Entry]]
    usual_tokens: Callable[[Any], Tokens]
    text_tokens: int
    embedding_work: Callable[[Any, Tokens], Work]
    layer_work: Callable[[Any, int, Tokens], Work]
    layer_bytes: Callable[[Any, RankTokens, int, int, frozenset[str]], float]
    embedding_bytes: Callable[[Any, tuple[int, int], int, int], float]
    encoder_facts: Callable[[Path, int | None], "EncoderFacts"]
    samples_evenly: bool = False
    original: OriginalLayout | None = None


@cache
def families() -> dict[str, Family]:
    """All families, by diffusers' name of their transformer."""
    folders = [found.name for found in pkgutil.iter_modules(models.__path__) if found.ispkg]
    packages = [importlib.import_module(f"{models.__name__}.{name}") for name in folders if name != "common"]
    return {package.FAMILY.class_name: package.FAMILY for package in packages}


def family_in(content: dict[str, Any], name: str) -> Family:
    """The family of the transformer whose config.json, called `name`, has this content. ValueError: none known."""
    kind = content.get("_class_name")
    if not isinstance(kind, str) or kind not in families():
        known = ", ".join(f"{family.class_name} ({family.products})" for family in families().values())
        raise ValueError(f"{name} describes a {kind} (_class_name); supported are {known}")
    return families()[kind]


def presets() -> dict[str, Sizes]:
    """Published sizes of all families, by name."""
    return {name: sizes for family in families().values() for name, sizes in family.presets.items()}


def read_sizes(source: dict[str, Any] | str | Path) -> Sizes:
    """The sizes in a transformer's config.json, in its content, or in the transformer or pipeline folder that holds it.

    Raises:
        ValueError: a transformer of no known family, or one with settings that its family does not know.
    """
    if isinstance(source, dict):
        content, name = source, "the configuration"
    else:
        path = config_file(Path(source))
        content, name = read_object(path), str(path)
    return family_in(content, name).read_sizes(content, name)


def model_sizes(model: ModelConfig) -> Sizes:
    """The sizes of the transformer that a recipe names.

    Raises:
        ValueError: a pipeline folder without a transformer of a known family, or with another one than the preset, or
            with one whose output is no velocity of its latents, or an unknown preset.
    """
    known = presets()
    if model.preset and model.preset not in known:
        raise ValueError(f"model.preset: {model.preset!r} is unknown; choose one of {', '.join(known)}")
    if not model.pipeline_dir:
        return known[model.preset]
    sizes = read_sizes(model.pipeline_dir)
    if model.preset and sizes != known[model.preset]:
        raise ValueError(
            f"model.pipeline_dir: {model.pipeline_dir} holds another transformer than {model.preset}, which "
            f"model.preset expects: {sizes.layers_in_words} of width {sizes.hidden_size}"
        )
    if sizes.in_channels != sizes.out_channels:
        raise ValueError(
            f"model.pipeline_dir: the transformer of {model.pipeline_dir} has in_channels {sizes.in_channels} and "
            f"out_channels {sizes.out_channels}: a model that reads more than the noisy latents, or predicts more than "
            "their velocity, cannot be trained here"
        )
    return sizes


def find_sizes(model: str) -> Sizes:
    """The sizes of a preset or of a pipeline folder.

    Raises:
        ValueError: neither a preset nor a folder with a transformer.
    """
    known = presets()
    if model in known:
        return known[model]
    if not Path(model).is_dir():
        raise ValueError(f"{model} is neither a pipeline folder nor a preset ({', '.join(known)})")
    return read_sizes(model)


def config_file(path: Path) -> Path:
    """The config.json meant by a file, a transformer folder or a pipeline folder."""
    candidates = [path] if path.is_file() else [path / "transformer" / "config.json", path / "config.json"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if not path.exists():
        raise ValueError(f"{path.absolute()} does not exist: a diffusers pipeline folder is expected there")
    raise ValueError(
        f"{path} holds no transformer: expected a diffusers pipeline folder (with transformer/config.json) or its "
        "transformer folder (with config.json)"
    )
