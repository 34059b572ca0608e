"""FLUX.1: double and single layers, rotary positions, a guidance scale among the inputs of the distilled model."""

from typing import TYPE_CHECKING

from soar_mega.models.family import Family
from soar_mega.models.flux import work
from soar_mega.models.flux.encoders import encoder_facts
from soar_mega.models.flux.mapping import entries
from soar_mega.models.flux.original import ORIGINAL
from soar_mega.models.flux.presets import PRESETS
from soar_mega.models.flux.sizes import CLASS_NAME, narrowed, read_sizes

if TYPE_CHECKING:
    from soar_mega.models.flux.model import Flux


def _transformer() -> "type[Flux]":
    from soar_mega.models.flux.model import Flux

    return Flux


FAMILY = Family(
    name="flux",
    class_name=CLASS_NAME,
    products="FLUX.1 dev and schnell",
    presets=PRESETS,
    read_sizes=read_sizes,
    narrowed=narrowed,
    transformer=_transformer,
    entries=entries,
    original=ORIGINAL,
    usual_tokens=work.usual_tokens,
    text_tokens=512,
    embedding_work=work.embedding_work,
    layer_work=work.layer_work,
    layer_bytes=work.layer_bytes,
    embedding_bytes=work.embedding_bytes,
    encoder_facts=encoder_facts,
    samples_evenly=True,
)
