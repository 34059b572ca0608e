"""The sizes of a FLUX.1 transformer."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from soar_mega.models.common.sizes import check_whole, make_sizes, refuse_unknown

if TYPE_CHECKING:
    from soar_mega.models.family import Family

CLASS_NAME = "FluxTransformer2DModel"
PATCH = 2  # FLUX's latents come in patches of 2 x 2, which diffusers cuts outside of its model
# what diffusers calls otherwise
NAMES = {"num_layers": "num_double_layers"}


@dataclass(frozen=True, kw_only=True)
class FluxSizes:
    """Sizes of a transformer; names and defaults are those of diffusers' FluxTransformer2DModel but for two.

    `in_channels` counts the latents' channels: diffusers counts those of a patch, four times as many. `num_layers`
    counts all layers, `num_double_layers` those that diffusers calls num_layers.

    Raises:
        ValueError: the sizes do not fit together.
    """

    in_channels: int = 16
    num_double_layers: int = 19  # text and image with weights of their own
    num_single_layers: int = 38  # both with the same
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # width of the text embeddings
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False  # the model is told a guidance scale: dev, not schnell
    # of a head, turned by text index (always 0), row and column
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    patch_size: ClassVar[int] = PATCH
    qk_norm: ClassVar[str] = "rms_norm"
    pos_embed_max_size: ClassVar[None] = None  # positions turn queries and keys

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type is int:
                check_whole(field.name, getattr(self, field.name))
        if type(self.guidance_embeds) is not bool:
            raise ValueError(f"guidance_embeds is {self.guidance_embeds!r}: it can be true or false")
        axes = self.axes_dims_rope
        if len(axes) != 3 or not all(type(width) is int and width > 0 and width % 2 == 0 for width in axes):
            raise ValueError(f"axes_dims_rope is {list(axes)}: it must list three even numbers")
        if sum(axes) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope is {list(axes)}: together they must be attention_head_dim = {self.attention_head_dim}"
            )

    @property
    def family(self) -> "Family":
        """FLUX.1."""
        from soar_mega.models.flux import FAMILY

        return FAMILY

    @property
    def layers_in_words(self) -> str:
        """How many layers there are of each kind."""
        return f"{self.num_double_layers} double and {self.num_single_layers} single layers"

    @property
    def num_layers(self) -> int:
        """Double layers, then single ones."""
        return self.num_double_layers + self.num_single_layers

    @property
    def out_channels(self) -> int:
        """Of the velocity: those of the latents."""
        return self.in_channels

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.num_attention_heads * self.attention_head_dim

    def to_diffusers(self) -> dict[str, Any]:
        """The content of diffusers' config.json."""
        return {
            "_class_name": CLASS_NAME,
            "patch_size": 1,
            "in_channels": self.in_channels * PATCH**2,
            "out_channels": None,
            "num_layers": self.num_double_layers,
            "num_single_layers": self.num_single_layers,
            "attention_head_dim": self.attention_head_dim,
            "num_attention_heads": self.num_attention_heads,
            "joint_attention_dim": self.joint_attention_dim,
            "pooled_projection_dim": self.pooled_projection_dim,
            "guidance_embeds": self.guidance_embeds,
            "axes_dims_rope": list(self.axes_dims_rope),
        }


def narrowed(sizes: FluxSizes) -> FluxSizes:
    """All layers and heads, but narrow: what runs at any layout of the model on a laptop."""
    return dataclasses.replace(
        sizes,
        in_channels=4,
        attention_head_dim=6,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 2),
    )


def read_sizes(content: dict[str, Any], name: str) -> FluxSizes:
    """The sizes in the content of a config.json called `name`; a ValueError where they cannot be."""
    settings = {NAMES.get(key, key): value for key, value in content.items() if not key.startswith("_")}
    _take_patches(settings, name)
    refuse_unknown(FluxSizes, settings, name)
    axes = settings.get("axes_dims_rope", FluxSizes.axes_dims_rope)
    if not isinstance(axes, list | tuple):
        raise ValueError(f"{name}: axes_dims_rope is {axes!r}: it must be a list of numbers")
    settings["axes_dims_rope"] = tuple(axes)
    return make_sizes(FluxSizes, settings, name)


def _take_patches(settings: dict[str, Any], name: str) -> None:
    """Take what diffusers says of patches out of the settings, and leave `in_channels` of the latents."""
    channels = settings.pop("in_channels", FluxSizes.in_channels * PATCH**2)
    if type(channels) is not int or channels < PATCH**2 or channels % PATCH**2:
        raise ValueError(f"{name}: in_channels is {channels!r}: it must be a multiple of {PATCH**2}")
    patch, out = settings.pop("patch_size", 1), settings.pop("out_channels", None)
    if patch != 1:
        raise ValueError(
            f"{name}: patch_size is {patch!r}: FLUX.1's patches are cut outside of it, so it is 1"
        )
    if out not in (None, channels):
        raise ValueError(
            f"{name}: out_channels is {out!r} and in_channels {channels}: a model whose input holds more than the "
            "noisy latents (FLUX.1 Fill, Depth or Canny) cannot be trained here"
        )
    settings["in_channels"] = channels // PATCH**2
