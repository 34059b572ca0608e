"""Whether a data set fits a model: latent channels, text widths, and the very encoders that made it."""

from pathlib import Path
from typing import Protocol

from soar_mega.data.fingerprints import fingerprints
from soar_mega.data.info import DatasetInfo
from soar_mega.models.family import read_sizes


class ModelSizes(Protocol):
    """The transformer's sizes that a data set has to match, named as in diffusers."""

    @property
    def in_channels(self) -> int: ...

    @property
    def joint_attention_dim(self) -> int: ...

    @property
    def pooled_projection_dim(self) -> int: ...


def check_compatible(
    info: DatasetInfo, path: str, pipeline_dir: str, sizes: ModelSizes | None = None
) -> None:
    """ValueError naming what differs between the data set at `path` and the model or the encoders of `pipeline`."""
    found = {
        "in_channels": info.latent_channels,
        "joint_attention_dim": info.text_shape[1],
        "pooled_projection_dim": info.pooled_size,
    }
    if sizes is None and pipeline_dir and (Path(pipeline_dir) / "transformer" / "config.json").is_file():
        sizes = read_sizes(pipeline_dir)
    wanted = {} if sizes is None else {name: getattr(sizes, name) for name in found}
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(
                f"{path} was encoded for a transformer with {name} {found[name]}, this one has {value}: prepare the "
                "images with this model's pipeline"
            )
    if not pipeline_dir or not Path(pipeline_dir).is_dir():
        return
    for part, fingerprint in fingerprints(Path(pipeline_dir)).items():
        if part in info.encoders and info.encoders[part] != fingerprint:
            raise ValueError(
                f"{path} was encoded by another {part} than {Path(pipeline_dir) / part}: prepare the images with this "
                "pipeline"
            )
