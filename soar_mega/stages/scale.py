"""A guidance scale as a recipe says it: one number, or how it is spread over samples. Needs no torch.

4.5                 the same for all
{1: 0.5, 3: 0.5}    each with its share of the samples
[1, 4.5]            anything between, uniformly
"""

from itertools import accumulate

Scale = float | list[float] | dict[str, float]

SCALES = "a number of at least 0, [low, high], or a mapping of scales to shares that add up to 1, as {1: 0.5, 3: 0.5}"


def is_scale(value: Scale) -> bool:
    """Whether it is one of the three forms."""
    if isinstance(value, list):
        return len(value) == 2 and 0 <= value[0] <= value[1]
    if isinstance(value, dict):
        shares = value.values()
        return (
            all(_is_number(scale) for scale in value)
            and all(0 <= share <= 1 for share in shares)
            and abs(sum(shares) - 1) < 1e-9
        )
    return value >= 0


def guided_share(scale: Scale) -> float:
    """The share of samples whose scale is not 1, so that their unconditional velocity is needed: 0 to 1."""
    if isinstance(scale, dict):
        shares = {float(each): share for each, share in scale.items()}
        return 1 - shares.get(1.0, 0.0)
    if isinstance(scale, list):
        return int(scale != [1, 1])
    return int(scale != 1)


def parts(scale: dict[str, float]) -> list[tuple[float, float]]:
    """The scales of a mapping and where the part of each ends on the way from 0 to 1, without those that have none."""
    present = [(float(each), share) for each, share in scale.items() if share > 0]
    ends = accumulate(share for _, share in present)
    return [(each, end) for (each, _), end in zip(present, ends, strict=True)]


def _is_number(text: str) -> bool:
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False
