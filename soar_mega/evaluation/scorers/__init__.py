"""Published metrics as scorers, by name. Importing this is cheap: what a scorer needs is imported when it is made."""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from soar_mega.evaluation.scorers.scorer_files import (
    AESTHETIC_HEAD,
    BERT_VOCABULARY,
    CLIP_H_TOKENIZER,
    CLIP_L,
    DETECTOR,
    HPS_WEIGHTS,
    IMAGE_REWARD_WEIGHTS,
    INCEPTION,
    PADDLE_OCR,
    PICK_SCORE,
    WeightFile,
    missing,
)

if TYPE_CHECKING:
    import torch

    from soar_mega.evaluation.scorer import Scorer


@dataclass(frozen=True)
class Entry:
    """A scorer that has not been made.

    Attributes:
        measures: in a few words.
        maker: module of this package and class.
        files: that it reads.
        packages: modules that it imports beside those that soar_mega needs.
        install: how to come by these.
    """

    measures: str
    maker: str
    files: tuple[WeightFile, ...]
    packages: tuple[str, ...] = ()
    install: str = "pip install 'soar_mega[evaluation]'"

    def lacks(self, weights_dir: Path | None) -> list[str]:
        """What is not here: packages, and files where a folder is given."""
        packages = [name for name in self.packages if importlib.util.find_spec(name) is None]
        lines = []
        if packages:
            named = " and ".join(f"the package {name}" for name in packages)
            lines.append(f"{named} ({self.install})")
        if weights_dir:
            lines += [f"{weights_dir / file.path}" for file in missing(self.files, weights_dir)]
        return lines

    def check(self, name: str, weights_dir: Path) -> None:
        """ValueError that names everything that `name` lacks."""
        if lacks := self.lacks(weights_dir):
            listing = "\n  ".join(lacks)
            advice = "`soar-mega fetch-weights --list` says where files come from"
            raise ValueError(f"{name} lacks\n  {listing}\n{advice}")


SCORERS = {
    "clip_score": Entry("cosine of image and prompt, CLIP ViT-L/14", "clip_score:ClipScore", CLIP_L),
    "ocr": Entry("text that can be read, by RapidOCR", "ocr:RapidReader", (), ("rapidocr", "onnxruntime")),
    "ocr_paddle": Entry(
        "text that can be read, by PaddleOCR 2",
        "ocr:PaddleReader",
        PADDLE_OCR,
        ("paddleocr", "paddle"),
        # what it needs does not go together with the rest (docs/scorers.md)
        install="in an environment of its own: pip install paddleocr==2.9.1 paddlepaddle==2.6.2",
    ),
    "gen_eval": Entry("objects, counts, colours, positions", "gen_eval:GenEval", (DETECTOR, *CLIP_L)),
    "gen_eval_rl": Entry("share of what GenEval demands", "gen_eval:GenEvalReward", (DETECTOR, *CLIP_L)),
    "pick_score": Entry("preference of people, logit scale x cosine", "pick_score:PickScore", PICK_SCORE),
    "pick_score_rl": Entry("pick_score / 26", "pick_score:PickScoreReward", PICK_SCORE),
    "hps": Entry("preference of people, HPS v2.1", "hps:HumanPreference", (HPS_WEIGHTS, *CLIP_H_TOKENIZER)),
    "aesthetic": Entry("beauty, without the prompt", "aesthetic:Aesthetic", (*CLIP_L, AESTHETIC_HEAD)),
    "image_reward": Entry(
        "preference of people, ImageReward v1.0",
        "image_reward:ImageReward",
        (IMAGE_REWARD_WEIGHTS, BERT_VOCABULARY),
    ),
}

# Of a whole set of images: no scorer judges them one by one.
SET_METRICS = {
    "fid": Entry(
        "FID, KID, precision and recall against a held-out set",
        "held_out:distance_to_held_out",
        (INCEPTION,),
        ("torch_fidelity", "torchvision"),
    ),
}


def make_scorer(name: str, weights_dir: str | Path, device: "str | torch.device" = "cpu") -> "Scorer":
    """A scorer that has read all its weights and can judge.

    Args:
        weights_dir: the folder that holds the files of `SCORERS[name].files`.

    Raises:
        ValueError: there is no such scorer, a package or a file is missing, a file is damaged, or its weights are of
            another architecture; names it.
    """
    import torch

    folder = Path(weights_dir)
    check_scorer(name, folder)
    module, class_name = SCORERS[name].maker.split(":")
    maker = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)
    scorer: Scorer = maker(folder, torch.device(device))
    return scorer


def check_scorer(name: str, weights_dir: Path) -> None:
    """ValueError where a scorer cannot be made here; names everything that it lacks."""
    if name not in SCORERS:
        raise ValueError(f"there is no scorer {name!r}; there are {', '.join(SCORERS)}")
    SCORERS[name].check(f"the scorer {name}", weights_dir)
