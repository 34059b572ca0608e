"""OCR: the formula, and text rendered in several fonts where RapidOCR is installed."""

import importlib.util
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from soar_mega.evaluation.scorers import make_scorer
from soar_mega.evaluation.scorers.ocr import TextReader, demanded_text, models_of_wheel, share_of_text

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
RAPID = importlib.util.find_spec("rapidocr") is not None
NEEDS_RAPID = pytest.mark.skipif(not RAPID, reason="rapidocr is not installed: text in images was not read")


@pytest.mark.parametrize(
    "target, read, share",
    [
        ("Hello World", "helloworld", 1),
        ("Hello World", "SAY HELLO WORLD AGAIN", 1),  # part of it
        ("Hello World", "", 0),
        ("Hello World", "hello wor1d", 0.9),
        ("Hello World", "helo wrld", 0.8),  # two left out
        ("abc", "xyzxyzxyz", 0),  # nine edits are three at most
        ("abcd", "abdc", 0.5),  # exchanged letters are two edits
        ("kitten", "sitting", 0.5),  # the textbook's three
        ("NASA 2049", "nasa2O49", 0.875),
    ],
)
def test_the_share_of_the_text_that_is_read(target: str, read: str, share: float) -> None:
    assert share_of_text(target, read) == pytest.approx(share)


def test_the_text_stands_between_double_quotes() -> None:
    assert demanded_text('A sign with "Open Late" beside "Closed"') == "Open Late"
    for prompt in ("A sign", 'A sign with "Open', 'A sign with "  " on it'):
        with pytest.raises(ValueError, match="must hold the text to be read between double quotes"):
            demanded_text(prompt)


def test_a_wheel_without_its_models_is_refused_instead_of_downloading(tmp_path: Path) -> None:
    (tmp_path / "PP_rec_small.onnx").touch()
    with pytest.raises(
        ValueError, match="one detection and one recognition model.*it holds PP_rec_small.onnx"
    ):
        models_of_wheel(tmp_path)
    (tmp_path / "PP_det_small.onnx").touch()
    assert [path.stem for path in models_of_wheel(tmp_path)] == ["PP_det_small", "PP_rec_small"]


def test_the_image_goes_to_the_reader_as_it_is(images: Tensor) -> None:
    class Echo(TextReader):
        name = "echo"

        def read(self, image: Image.Image) -> str:
            assert np.array(image)[5, 7].tolist() == (images[0, :, 5, 7] * 255).round().int().tolist()
            return "Open"

    values = Echo([], torch.device("cpu")).score(images[:1], ['"Open Late"'], [{}])
    assert values["echo"].tolist() == [0.5]


@pytest.mark.skipif(RAPID, reason="rapidocr is installed")
def test_a_reader_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the scorer ocr lacks\n  the package rapidocr"):
        make_scorer("ocr", tmp_path)


@NEEDS_RAPID
def test_text_in_several_fonts_is_read(tmp_path: Path) -> None:
    def page(font: str, text: str) -> Tensor:
        image = Image.new("RGB", (512, 256), (225, 235, 215))
        ImageDraw.Draw(image).text(
            (30, 90), text, font=ImageFont.truetype(FONTS / f"{font}.ttf", 48), fill=(30, 20, 90)
        )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    fonts = ["DejaVuSans", "DejaVuSerif-Italic", "DejaVuSansMono-Bold", "STIXGeneral", "cmr10", "cmtt10"]
    pages = torch.stack([page(font, "Fresh bread 7") for font in fonts])
    scorer = make_scorer("ocr", tmp_path)
    together = scorer.score(pages, ['a sign with "Fresh Bread 7"'] * len(fonts), [{}] * len(fonts))["ocr"]
    assert together.min() > 0.9 and together.median() == 1
    assert scorer.version.startswith("1: RapidOCR 3.") and len(scorer.weights_hash) == 64
    mixed = torch.cat([pages[:1], torch.ones(1, 3, 256, 512)])  # the second is blank
    values = scorer.score(mixed, ['"fresh bread 8"', '"fresh bread 7"'], [{}, {}])["ocr"]
    assert values.tolist() == [pytest.approx(10 / 11), 0]
