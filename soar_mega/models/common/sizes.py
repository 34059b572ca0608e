"""What the sizes of every family say."""

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from soar_mega.rules import Rule

if TYPE_CHECKING:
    from soar_mega.models.family import Family

LARGEST = 2**31  # of sizes
PIXELS = 8  # of a latent's side
S = TypeVar("S")


class Sizes(Protocol):
    """Sizes of a transformer: hashable, equal where all numbers are, named as in diffusers where it has a name."""

    def __hash__(self) -> int: ...

    @property
    def family(self) -> "Family":
        """Whose sizes these are."""

    @property
    def num_layers(self) -> int:
        """Of all kinds together; they are numbered from 0 in the order in which they run."""

    @property
    def layers_in_words(self) -> str:
        """How many there are of each kind."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def attention_head_dim(self) -> int: ...

    @property
    def qk_norm(self) -> str | None:
        """What norms queries and keys: rms_norm, or None."""

    @property
    def guidance_embeds(self) -> bool:
        """Whether the model is told a guidance scale, in place of being asked with and without its conditions."""

    @property
    def in_channels(self) -> int:
        """Of the latents."""

    @property
    def out_channels(self) -> int:
        """Of the velocity."""

    @property
    def patch_size(self) -> int:
        """Side, in latents, of the square that is one image token."""

    @property
    def joint_attention_dim(self) -> int:
        """Width of the text embeddings."""

    @property
    def pooled_projection_dim(self) -> int:
        """Width of the pooled text."""

    @property
    def pos_embed_max_size(self) -> int | None:
        """Side of the table of positions, in patches; None: there is none, and any side has positions."""

    def to_diffusers(self) -> dict[str, Any]:
        """The content of diffusers' config.json."""


def side_rule(sizes: Sizes, unit: int = 1) -> Rule:
    """What a side of latents may be: whole patches that have positions.

    Args:
        unit: PIXELS for a side in pixels.
    """
    patch, largest = unit * sizes.patch_size, sizes.pos_embed_max_size
    if largest is None:
        return (lambda side: side % patch == 0), f"a multiple of {patch}"
    most = patch * largest
    return (lambda side: side % patch == 0 and side <= most), f"a multiple of {patch} and at most {most}"


def image_side(sizes: Sizes, asked: int | None) -> int:
    """The side in pixels of the images that a command speaks of: 512, or the most that the model takes, unless asked.

    Raises:
        ValueError: the model takes no such images.
    """
    holds, words = side_rule(sizes, unit=PIXELS)
    largest = sizes.pos_embed_max_size
    usual = 512 if largest is None else min(512, PIXELS * sizes.patch_size * largest)
    side = usual if asked is None else asked
    if not holds(side):
        raise ValueError(f"--image-size {side}: for this model it must be {words}")
    return side


def check_latent_size(sizes: Sizes, latent_size: tuple[int, int]) -> None:
    """Raise a ValueError unless latents can be of (H, W)."""
    holds, words = side_rule(sizes)
    if not all(map(holds, latent_size)):
        raise ValueError(f"latents of {' x '.join(map(str, latent_size))}: each side must be {words}")


def check_whole(name: str, value: Any) -> None:
    """Raise a ValueError unless `value`, of the setting `name`, can be a size."""
    if type(value) is not int or not 1 <= value < LARGEST:
        raise ValueError(f"{name} is {value!r}: it must be a whole number of at least 1")


def refuse_unknown(kind: type[Any], settings: dict[str, Any], name: str) -> None:
    """Raise a ValueError for settings, of the config.json called `name`, that sizes of a kind do not have."""
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"{name} has settings that this model does not know: {', '.join(unknown)}")


def make_sizes(kind: type[S], settings: dict[str, Any], name: str) -> S:
    """Sizes of a kind; a ValueError says in which config.json they cannot be."""
    try:
        return kind(**settings)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
