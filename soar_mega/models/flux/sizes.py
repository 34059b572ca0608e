"""The sizes of a FLUX.1 transformer."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.models.config import LARGEST, config_file
from soar_mega.user_files import read_object

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
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # of a head, turned by text index (always 0), row and column

    family = "flux"
    patch_size = PATCH

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or not 1 <= value < LARGEST):
                raise ValueError(f"{field.name} is {value!r}: it must be a whole number of at least 1")
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

    @classmethod
    def from_diffusers(cls, source: dict[str, Any] | str | Path) -> "FluxSizes":
        """Read a config.json, its content, or the transformer or pipeline folder that holds it.

        Raises:
            ValueError: not the configuration of a FLUX transformer, or one with settings unknown here.
        """
        if isinstance(source, dict):
            return cls._from_dict(source, "the configuration")
        path = config_file(Path(source))
        return cls._from_dict(read_object(path), str(path))

    @classmethod
    def _from_dict(cls, content: dict[str, Any], name: str) -> "FluxSizes":
        kind = content.get("_class_name", CLASS_NAME)
        if kind != CLASS_NAME:
            raise ValueError(f"{name} describes a {kind}, not a {CLASS_NAME} (FLUX.1)")
        settings = {
            NAMES.get(key, key): value for key, value in content.items() if not key.startswith("_")
        }
        _check_patches(settings, name)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"{name} has settings that this model does not know: {', '.join(unknown)}")
        axes = settings.get("axes_dims_rope", cls.axes_dims_rope)
        if not isinstance(axes, list | tuple):
            raise ValueError(f"{name}: axes_dims_rope is {axes!r}: it must be a list of numbers")
        settings["axes_dims_rope"] = tuple(axes)
        try:
            return cls(**settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

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


def _check_patches(settings: dict[str, Any], name: str) -> None:
    """Take what diffusers says of patches out of the settings, and leave `in_channels` of the latents."""
    channels = settings.pop("in_channels", FluxSizes.in_channels * PATCH**2)
    if type(channels) is not int or channels < PATCH**2 or channels % PATCH**2:
        raise ValueError(f"{name}: in_channels is {channels!r}: it must be a multiple of {PATCH**2}")
    patch, out = settings.pop("patch_size", 1), settings.pop("out_channels", None)
    if patch != 1:
        raise ValueError(f"{name}: patch_size is {patch!r}: FLUX.1's patches are cut outside of it, so it is 1")
    if out not in (None, channels):
        raise ValueError(
            f"{name}: out_channels is {out!r} and in_channels {channels}: a model whose input holds more than the noisy "
            "latents (FLUX.1 Fill, Depth or Canny) cannot be trained here"
        )
    settings["in_channels"] = channels // PATCH**2
