"""Names of a pipeline with adapters, as verbs take them."""

from pathlib import Path


def split_adapted(text: str) -> tuple[str, str]:
    """The parts of PIPELINE+ADAPTERS; a name that is there as a whole, or has no +, is a pipeline without adapters."""
    folder, plus, lora = text.rpartition("+")
    return (folder, lora) if plus and not Path(text).exists() else (text, "")
