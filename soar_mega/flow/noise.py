"""Random numbers as a function of what they are for: Philox4x32-10 of a counter under a key.

The key comes from (seed, stream), the counter from (element block, point index, position low, position high),
where position is a sample's place in the training sequence. The same draw is therefore the same number in any
batch, on any rank and after any resume. Philox: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def stream_key(seed: int, stream: str) -> tuple[int, int]:
    """Key words (low, high): the first 8 bytes, little-endian, of the SHA-256 of "{seed}/{stream}"."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    return key & _WORD, key >> 32


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 of counters [..., 4] -> [..., 4]; both int64 holding uint32 words."""
    c0, c1, c2, c3 = counter.unbind(-1)
    return torch.stack(_philox_words(c0, c1, c2, c3, key), dim=-1)


def normal(
    seed: int,
    stream: str,
    position: Tensor,  # [B] int64
    point: Tensor | int,  # [B] int64, or one for all
    shape: Sequence[int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal numbers [B, *shape] float32 keyed by (seed, stream, position, point, element).

    Element e of the flattened shape is lane e % 4 of block e // 4. Words (x0, x1) of a block make lanes 0 and
    1, words (x2, x3) lanes 2 and 3, by Box-Muller with u(x) = (x + 0.5) 2^-32:

        lane 0 = r cos(theta), lane 1 = r sin(theta), r = sqrt(-2 ln u(x0)), theta = 2 pi u(x1)

    computed here in float64. A float32 kernel repeats it to 1e-6 of the largest number when it avoids
    rounding near 1: ln u(x) = ln((x + 0.5) 2^-32) for x < 2^31, else log1p(-((2^32 - 1 - x) + 0.5) 2^-32);
    and theta = pi (int32(x) + 0.5) 2^-31, the same angle modulo 2 pi.

    Args:
        device: where to draw; that of `position` if None. The numbers do not depend on it.
    """
    count = math.prod(shape)
    x0, x1, x2, x3 = _draw(seed, stream, position, point, -(-count // 4), device)
    lanes = torch.stack([*_box_muller(x0, x1), *_box_muller(x2, x3)], dim=-1)  # [B, blocks, 4]
    return lanes.flatten(1)[:, :count].reshape(-1, *shape)


def uniform(
    seed: int,
    stream: str,
    position: Tensor,  # [B] int64
    point: Tensor | int = 0,
    count: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform numbers [B, count] float64 inside (0, 1), keyed by (seed, stream, position, point, element).

    Number e comes from words (x0, x1) of block e // 2 for even e, (x2, x3) for odd e: the upper 26 bits of
    both make 52 bits k, and u = (k + 0.5) 2^-52.
    """
    x0, x1, x2, x3 = _draw(seed, stream, position, point, -(-count // 2), device)
    pairs = torch.stack([_unit_interval(x0, x1), _unit_interval(x2, x3)], dim=-1)  # [B, blocks, 2]
    return pairs.flatten(1)[:, :count]


def subset(seed: int, stream: str, position: Tensor, size: int, count: int) -> Tensor:
    """`count` of the numbers 0..size-1, rising, [B, count] int64: any as likely as others, keyed as `uniform` is."""
    drawn = uniform(seed, stream, position, count=size).argsort(dim=1, stable=True)[:, :count]
    return drawn.sort(dim=1).values


BALANCED = 6  # neighbours that `balanced` keeps apart: 2^6


def balanced(seed: int, stream: str, position: Tensor) -> Tensor:
    """Uniform numbers [B] float64 inside (0, 1) that are spread evenly over neighbours, keyed as `uniform` is.

    Of 2^k positions from a multiple of 2^k on (k up to 6) exactly one has its number in each of the 2^k equal parts of
    the interval: whatever a share of samples costs, equal blocks of them cost the same. Each number for itself is
    uniform: its k-th binary digit is the k-th lowest bit of its position, flipped by a coin of its 2^k neighbours.
    """
    number = uniform(seed, stream, position)[:, 0]
    for k in reversed(range(BALANCED)):
        coin = uniform(seed, stream, position >> (k + 1), point=k + 1)[:, 0] < 0.5
        digit = ((position >> k) & 1 == 1) ^ coin
        number = (digit + number) / 2
    return number


def _draw(
    seed: int,
    stream: str,
    position: Tensor,
    point: Tensor | int,
    blocks: int,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words [B, blocks] for every counter (block, point, position low, position high)."""
    assert position.dtype == torch.int64 and position.ndim == 1, "position is [B] int64"
    position = position.to(device or position.device)[:, None]
    if isinstance(point, int):
        point = torch.full_like(position[:, 0], point)  # made where it is used: nothing is copied there
    point = point.to(position.device)[:, None]
    block = torch.arange(blocks, device=position.device)[None, :]
    return _philox_words(block, point, position & _WORD, (position >> 32) & _WORD, stream_key(seed, stream))


def _philox_words(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ten rounds on separate words, which may be of different, broadcastable shapes."""
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two words wraps around as int64; its 64 bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _box_muller(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    radius = ((x.double() + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()
    angle = (y.double() + 0.5) * (2 * math.pi * 2.0**-32)
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()


def _unit_interval(x: Tensor, y: Tensor) -> Tensor:
    return (((x >> 6 << 26) | (y >> 6)).double() + 0.5) * 2.0**-52
