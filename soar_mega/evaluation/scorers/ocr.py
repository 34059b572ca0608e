"""OCR: how much of the text that a prompt demands can be read in the image, by one of two readers.

The published table was read by PaddleOCR 2.9.1; RapidOCR brings its models in its wheel. They read differently, so each
is a scorer of its own name.
"""

from abc import abstractmethod
from collections.abc import Mapping
from importlib import metadata as installed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from soar_mega.evaluation.pictures import to_pil
from soar_mega.evaluation.scorers.per_image import PerImage
from soar_mega.evaluation.scorers.scorer_files import (
    PADDLE_DETECTION,
    PADDLE_DIRECTION,
    PADDLE_OCR,
    PADDLE_RECOGNITION,
)
from soar_mega.evaluation.text_share import share_read


class TextReader(PerImage):
    """1 - min(d, n)/n: n letters are demanded, and what was read is d edits away, 0 if the text is part of it."""

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """See `Particular`."""
        demanded_text(prompt)

    def judge(self, image: Tensor, prompt: str, metadata: Mapping[str, Any]) -> dict[str, float]:
        target = demanded_text(prompt)
        return {self.name: share_of_text(target, self.read(to_pil(image)))}

    @abstractmethod
    def read(self, image: Image.Image) -> str:
        """All text in the image, line after line without a gap; "" where there is none."""


class RapidReader(TextReader):
    """RapidOCR with the models of its wheel, upright text only."""

    name = "ocr"

    def __init__(self, weights_dir: Path, device: torch.device) -> None:
        import rapidocr

        detection, recognition = models_of_wheel(Path(rapidocr.__file__).parent / "models")
        super().__init__([detection, recognition], device)
        self.version = f"1: RapidOCR {installed.version('rapidocr')}, {detection.stem}, {recognition.stem}"
        self.engine = rapidocr.RapidOCR(
            params={
                "Det.model_path": str(detection),
                "Rec.model_path": str(recognition),
                "Global.use_cls": False,
                "Global.log_level": "error",
                "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
            }
        )

    def read(self, image: Image.Image) -> str:
        return "".join(self.engine(image).txts or ())


class PaddleReader(TextReader):
    """PaddleOCR as the published script calls it, with its English models from the folder of weights."""

    name = "ocr_paddle"

    def __init__(self, weights_dir: Path, device: torch.device) -> None:
        super().__init__([weights_dir / file.path for file in PADDLE_OCR], device)
        release = installed.version("paddleocr")
        if not release.startswith("2."):
            raise ValueError(f"the scorer {self.name} calls PaddleOCR 2 (published: 2.9.1), not {release}")
        from paddleocr import PaddleOCR

        self.version = f"1: PaddleOCR {release}, {PADDLE_DETECTION}, {PADDLE_RECOGNITION}"
        place = weights_dir / PADDLE_OCR[0].place
        # A folder that holds its files is not downloaded, not even the third one's, which cls=False never asks for.
        self.engine = PaddleOCR(
            use_angle_cls=False,
            lang="en",
            use_gpu=device.type == "cuda",
            show_log=False,
            det_model_dir=str(place / PADDLE_DETECTION),
            rec_model_dir=str(place / PADDLE_RECOGNITION),
            cls_model_dir=str(place / PADDLE_DIRECTION),
        )

    def read(self, image: Image.Image) -> str:
        lines = self.engine.ocr(np.array(image), cls=False)[0] or ()
        return "".join(text for _, (text, score) in lines if score > 0)


def models_of_wheel(folder: Path) -> tuple[Path, Path]:
    """The detection and the recognition model. ValueError where the wheel does not hold one of each."""
    found = [sorted(folder.glob(f"*_{task}*.onnx")) for task in ("det", "rec")]
    if [len(paths) for paths in found] != [1, 1]:
        raise ValueError(
            f"{folder} must hold one detection and one recognition model, as the wheel of rapidocr 3.10 does; it holds "
            f"{', '.join(path.name for path in folder.glob('*.onnx')) or 'none'}"
        )
    return found[0][0], found[1][0]


def demanded_text(prompt: str) -> str:
    """What stands between the first two double quotes.

    Raises:
        ValueError: there is no such text.
    """
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].replace(" ", ""):
        raise ValueError(f"the prompt {prompt!r} must hold the text to be read between double quotes")
    return parts[1]


def share_of_text(target: str, text: str) -> float:
    """In lower case and without spaces."""
    wanted, read = (words.replace(" ", "").lower() for words in (target, text))
    return share_read(wanted, read)
