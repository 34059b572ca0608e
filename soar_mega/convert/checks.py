"""Whether a file or folder holds the tensors that it should."""

from collections.abc import Mapping

from soar_mega.convert.safetensors_reader import Reader
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.common.tensor_map import key_shapes

MAX_LISTED = 10


def diffusers_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shape of each of diffusers' tensors of a transformer."""
    return key_shapes(sizes.family.entries(sizes))


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]], reader: Reader, told_by: str, prefix: str = ""
) -> None:
    """ValueError where tensors are missing, unknown, or of another shape or a type of number that is no model's.

    Args:
        told_by: what implies the shapes, for the message.
        prefix: of the names in the file; what has another one is not looked at.
    """
    held = {key.removeprefix(prefix): key for key in reader.files if key.startswith(prefix)}
    problems = [f"missing: {prefix}{name} {shape}" for name, shape in wanted.items() if name not in held]
    problems += [
        f"unknown: {key} in {reader.files[key].name}" for name, key in held.items() if name not in wanted
    ]
    for name, shape in wanted.items():
        if name in held and (found := reader.shape(held[name])) != shape:
            key = held[name]
            problems.append(
                f"shape of {key} in {reader.files[key].name} is {found}, {told_by} implies {shape}"
            )
    if problems:
        raise ValueError(f"the weights in {reader.path} do not fit {told_by}:\n  {listed(problems)}")
    for name in wanted:
        reader.dtype(held[name])


def listed(lines: list[str]) -> str:
    """One line each, up to a limit."""
    more = f"\n  and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    return "\n  ".join(lines[:MAX_LISTED]) + more
