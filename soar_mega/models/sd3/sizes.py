"""The sizes of an SD3-family transformer, under diffusers' names."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from soar_mega.models.common.sizes import check_whole, make_sizes, refuse_unknown

if TYPE_CHECKING:
    from soar_mega.models.family import Family

CLASS_NAME = "SD3Transformer2DModel"


@dataclass(frozen=True, kw_only=True)
class SD3Sizes:
    """Sizes of a transformer; names and defaults are those of diffusers' SD3Transformer2DModel.

    Raises:
        ValueError: the sizes do not fit together.
    """

    sample_size: int = 128  # latent side that the position table was made for
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 18
    num_attention_heads: int = 18
    attention_head_dim: int = 64
    joint_attention_dim: int = 4096  # width of the text embeddings
    caption_projection_dim: int = 1152  # their width inside: the hidden size
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96  # side of the position table, in patches
    dual_attention_layers: tuple[int, ...] = ()  # layers with a second, image-only attention
    qk_norm: str | None = None  # rms_norm or None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type is int:
                check_whole(field.name, getattr(self, field.name))
        if not all(
            type(layer) is int and 0 <= layer < self.num_layers for layer in self.dual_attention_layers
        ):
            raise ValueError(
                f"dual_attention_layers is {list(self.dual_attention_layers)}: it must list layers from 0 to "
                f"{self.num_layers - 1}"
            )
        if self.caption_projection_dim != self.hidden_size:
            raise ValueError(
                f"caption_projection_dim is {self.caption_projection_dim}, but text and image meet in one attention: "
                f"it must be num_attention_heads x attention_head_dim = {self.hidden_size}"
            )
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}: it can be 'rms_norm' or null")
        if self.hidden_size % 4:
            raise ValueError(
                f"the hidden size {self.hidden_size} must be a multiple of 4 for sine-cosine positions"
            )

    @property
    def guidance_embeds(self) -> bool:
        """It is asked with and without its conditions."""
        return False

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def family(self) -> "Family":
        """Stable Diffusion 3."""
        from soar_mega.models.sd3 import FAMILY

        return FAMILY

    @property
    def layers_in_words(self) -> str:
        """How many layers there are of each kind."""
        dual = f", dual attention in {len(self.dual_attention_layers)}" if self.dual_attention_layers else ""
        return f"{self.num_layers} layers{dual}"

    def to_diffusers(self) -> dict[str, Any]:
        """The content of diffusers' config.json."""
        content = dataclasses.asdict(self)
        content["dual_attention_layers"] = list(self.dual_attention_layers)
        return {"_class_name": CLASS_NAME, **content}


def narrowed(sizes: SD3Sizes) -> SD3Sizes:
    """All layers and heads, but narrow: what runs at any layout of the model on a laptop."""
    return dataclasses.replace(
        sizes,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        attention_head_dim=4,
        joint_attention_dim=32,
        caption_projection_dim=4 * sizes.num_attention_heads,
        pooled_projection_dim=16,
        pos_embed_max_size=32,
    )


def read_sizes(content: dict[str, Any], name: str) -> SD3Sizes:
    """The sizes in the content of a config.json called `name`; a ValueError where they cannot be."""
    settings = {key: value for key, value in content.items() if not key.startswith("_")}
    refuse_unknown(SD3Sizes, settings, name)
    dual = settings.get("dual_attention_layers") or ()
    if not isinstance(dual, list | tuple):
        raise ValueError(f"{name}: dual_attention_layers is {dual!r}: it must be a list of layers")
    settings["dual_attention_layers"] = tuple(dual)
    if settings.get("out_channels", 0) is None:
        settings["out_channels"] = settings.get("in_channels", SD3Sizes.in_channels)
    return make_sizes(SD3Sizes, settings, name)
