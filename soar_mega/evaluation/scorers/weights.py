"""The files that the scorers read: exact names, the public places they come from, sizes and hashes where known.

Nothing here is ever downloaded: a cluster without a network gets these files from somebody who copies them. A file of
the place OWNER/NAME is expected at OWNER/NAME/file in the folder of weights.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WeightFile:
    """A file below the folder of weights.

    Attributes:
        place: the public repository that has it, as OWNER/NAME.
        name: of the file there.
        size: bytes, None where not known.
        sha256: all of it, or its first digits where only those are published; "" where not known.
    """

    place: str
    name: str
    size: int | None = None
    sha256: str = ""

    @property
    def path(self) -> str:
        """Below the folder of weights."""
        return f"{self.place}/{self.name}"


def clip_tokenizer_files(place: str) -> tuple[WeightFile, ...]:
    """The vocabulary and the merges of a CLIP."""
    return WeightFile(place, "vocab.json"), WeightFile(place, "merges.txt")


OPENAI_CLIP = "openai/clip-vit-large-patch14"
LAION_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

CLIP_L = (
    WeightFile(OPENAI_CLIP, "config.json"),
    WeightFile(OPENAI_CLIP, "model.safetensors"),
    *clip_tokenizer_files(OPENAI_CLIP),
)

CLIP_H_TOKENIZER = clip_tokenizer_files(LAION_CLIP)
PICK_SCORE = (
    WeightFile("yuvalkirstain/PickScore_v1", "config.json"),
    WeightFile("yuvalkirstain/PickScore_v1", "model.safetensors"),
    *CLIP_H_TOKENIZER,
)
AESTHETIC_HEAD = WeightFile(
    "christophschuhmann/improved-aesthetic-predictor",
    "sac+logos+ava1-l14-linearMSE.pth",
    3714759,
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)
HPS_WEIGHTS = WeightFile("xswu/HPSv2", "HPS_v2.1_compressed.pt")
IMAGE_REWARD_WEIGHTS = WeightFile("THUDM/ImageReward", "ImageReward.pt")
BERT_VOCABULARY = WeightFile("google-bert/bert-base-uncased", "vocab.txt")


def missing(files: Iterable[WeightFile], weights_dir: Path) -> list[WeightFile]:
    """Those that are not there, or empty."""
    paths = {file: weights_dir / file.path for file in files}
    return [file for file, path in paths.items() if not path.is_file() or path.stat().st_size == 0]


def hash_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the SHA-256 of each file, in the order of their names; "" of none."""
    lines = []
    for path in sorted(paths):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {path.name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""
