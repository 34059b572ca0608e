"""Stable Diffusion 3 and 3.5: joint layers of text and image, positions from a table."""

from typing import TYPE_CHECKING

from soar_mega.models.family import Family
from soar_mega.models.sd3 import work
from soar_mega.models.sd3.encoders import encoder_facts
from soar_mega.models.sd3.mapping import entries
from soar_mega.models.sd3.original import ORIGINAL
from soar_mega.models.sd3.presets import PRESETS
from soar_mega.models.sd3.sizes import CLASS_NAME, narrowed, read_sizes

if TYPE_CHECKING:
    from soar_mega.models.sd3.model import MMDiT


def _transformer() -> "type[MMDiT]":
    from soar_mega.models.sd3.model import MMDiT

    return MMDiT


FAMILY = Family(
    name="sd3",
    class_name=CLASS_NAME,
    products="Stable Diffusion 3 and 3.5",
    presets=PRESETS,
    read_sizes=read_sizes,
    narrowed=narrowed,
    transformer=_transformer,
    entries=entries,
    original=ORIGINAL,
    usual_tokens=work.usual_tokens,
    text_tokens=77 + 77,
    embedding_work=work.embedding_work,
    layer_work=work.layer_work,
    layer_bytes=work.layer_bytes,
    embedding_bytes=work.embedding_bytes,
    encoder_facts=encoder_facts,
)
