"""The files that the scorers read: exact names, the public places they come from, sizes and hashes where known.

Nothing here is ever downloaded: a cluster without a network gets these files from somebody who copies them. A file of
the place OWNER/NAME is expected at OWNER/NAME/file in the folder of weights.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
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


OPENAI_CLIP = "openai/clip-vit-large-patch14"
LAION_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

# Sizes and hashes are those that public lists of them agree on, or of the file itself where it could be had; else they
# are unknown.
CLIP_L = (
    WeightFile(
        OPENAI_CLIP, "config.json", 4519, "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a"
    ),
    WeightFile(
        OPENAI_CLIP,
        "model.safetensors",
        1710540580,
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    ),
    WeightFile(
        OPENAI_CLIP,
        "vocab.json",
        961143,
        "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69",
    ),
    WeightFile(
        OPENAI_CLIP,
        "merges.txt",
        524619,
        "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
    ),
)
CLIP_H_TOKENIZER = (WeightFile(LAION_CLIP, "vocab.json"), WeightFile(LAION_CLIP, "merges.txt"))
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
BERT_VOCABULARY = WeightFile(
    "google-bert/bert-base-uncased",
    "vocab.txt",
    231508,
    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)
DETECTOR = WeightFile(
    "open-mmlab/mmdetection",
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
    sha256="743b7d99",  # its name ends with the first digits
)
PADDLE_DETECTION, PADDLE_RECOGNITION = "en_PP-OCRv3_det_infer", "en_PP-OCRv4_rec_infer"
PADDLE_DIRECTION = "ch_ppocr_mobile_v2.0_cls_infer"
PADDLE_OCR = tuple(
    WeightFile("PaddlePaddle/PaddleOCR", f"{folder}/inference.{kind}")
    for folder in (PADDLE_DETECTION, PADDLE_RECOGNITION, PADDLE_DIRECTION)
    for kind in ("pdmodel", "pdiparams")
)
INCEPTION = WeightFile(
    "toshas/torch-fidelity",
    "weights-inception-2015-12-05-6726825d.pth",
    95628359,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)


def missing(files: Iterable[WeightFile], weights_dir: Path) -> list[WeightFile]:
    """Those that are not there, or empty."""
    paths = {file: weights_dir / file.path for file in files}
    return [file for file, path in paths.items() if not path.is_file() or path.stat().st_size == 0]


def differs(file: WeightFile, weights_dir: Path, verify: bool = False) -> str:
    """How a file in the folder is not the published one, "" where nothing speaks against it.

    Args:
        verify: read it all for its SHA-256, where that is known.
    """
    path = weights_dir / file.path
    if not path.is_file():
        return "MISSING"
    if file.size and path.stat().st_size != file.size:
        return (
            f"has {path.stat().st_size:,} bytes, not {file.size:,}: not the published file, or not all of it"
        )
    if verify and file.sha256 and not (found := _sha256(path)).startswith(file.sha256):
        return f"has SHA-256 {found}: not the published file"
    return ""


def hash_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the SHA-256 of each file, in the order of their names; "" of none."""
    listing = "".join(f"{_sha256(path)} {path.name}\n" for path in sorted(paths))
    return hashlib.sha256(listing.encode()).hexdigest() if listing else ""


def as_it_is(path: Path) -> tuple[Path, int, int]:
    """A file, with what tells it from another one that takes its place: size and time of change."""
    state = path.stat()
    return path.absolute(), state.st_size, state.st_mtime_ns


def _sha256(path: Path) -> str:
    return _sha256_of(*as_it_is(path))


@cache
def _sha256_of(path: Path, size: int, changed: int) -> str:
    """Once for all scorers that read the file as it is."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
