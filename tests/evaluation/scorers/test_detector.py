"""GenEval's detector: the published weights' names and order, and what becomes of its answers."""

from pathlib import Path
from types import SimpleNamespace

import by_hand_detector
import pytest
import torch
from torch import Tensor

from soar_mega.evaluation.scorers import tiny_detector
from soar_mega.evaluation.scorers.detector import Detector, detector_config, normalize, resize
from soar_mega.evaluation.scorers.gen_eval_rules import CLASSES
from soar_mega.evaluation.scorers.scorer_files import DETECTOR


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.inference_mode()
def test_converted_weights_compute_what_mmdetection_computes(weights_dir: Path) -> None:
    path = weights_dir / DETECTOR.path
    # Every stage is wider than a window, is padded to whole windows, and one of them is shifted.
    pixels = torch.randn(3, 256, 288, generator=torch.Generator().manual_seed(2))
    sizes = list(tiny_detector.DEPTHS), list(tiny_detector.HEADS), tiny_detector.WINDOW
    classes, masks = by_hand_detector.detect(torch.load(path)["state_dict"], pixels, *sizes)
    answer = Detector(path, torch.device("cpu")).model(pixel_values=pixels[None])
    assert error(answer.class_queries_logits[0], classes) < 1e-5
    assert error(answer.masks_queries_logits[0], masks) < 1e-5


def test_the_published_detector_has_its_sizes_without_a_config(tmp_path: Path) -> None:
    config = detector_config(tmp_path)
    assert config.backbone_config.depths == [2, 2, 18, 2] and config.num_labels == 80
    assert (config.num_queries, config.encoder_layers, config.decoder_layers) == (100, 6, 10)


def test_an_image_becomes_800_pixels_high_on_grey_margins() -> None:
    """Doubling each pixel leaves a bilinear filter nothing to choose in the middle of equal neighbours."""
    image = torch.full((3, 400, 500), 99.0)
    image[0, :, 250:] = 200.0
    larger = resize(image)
    assert larger.shape == (3, 800, 1000) and larger[0, 5, 3] == 99 and larger[0, 5, 996] == 200
    assert resize(torch.zeros(3, 300, 1000)).shape == (3, 400, 1333)  # the longer edge is the limit
    pixels = normalize(larger)
    assert pixels.shape == (1, 3, 800, 1024)
    assert pixels[0, :, 0, 1000].tolist() == pytest.approx(
        [(128 - 123.675) / 58.395, 11.72 / 57.12, 24.47 / 57.375]
    )
    assert pixels[0, 1, 0, 0] == pytest.approx((99 - 116.28) / 57.12)


def test_masks_become_boxes_and_scores(weights_dir: Path) -> None:
    """By mmdetection's rule: the class's probability times the mask's mean certainty inside."""
    detector = Detector(weights_dir / DETECTOR.path, torch.device("cpu"))
    classes = torch.full((1, 3, 81), -20.0)
    classes[0, 0, CLASSES.index("dog")] = 0.0  # certain
    classes[0, 1, [CLASSES.index("cat"), CLASSES.index("dog")]] = 0.0  # a half each
    classes[0, 2, [3, 4, 5, 80]] = 0.0  # a quarter each is below the threshold
    masks = torch.full((1, 3, 200, 200), -5.0)
    masks[0, 0, 40:120, 20:60] = 2.0  # of a picture of 800 x 800, whose quarter this is
    masks[0, 1, 0:40, 100:200] = 5.0
    detector.model = lambda pixel_values: SimpleNamespace(  # type: ignore[assignment]
        class_queries_logits=classes, masks_queries_logits=masks
    )
    found = detector.find(torch.zeros(3, 100, 100))
    assert {name: len(items) for name, items in found.items()} == {"dog": 2, "cat": 1}
    dog, other = sorted(found["dog"], key=lambda item: -item.score)
    inside = masks[0].new_tensor([2.0, 5.0]).sigmoid().tolist()
    assert dog.box == (10, 20, 30, 60) and dog.score == pytest.approx(inside[0], rel=2e-2)
    assert int(dog.mask.sum()) == 20 * 40 and bool(dog.mask[20, 10]) and not dog.mask[19, 10]
    assert other.box == (50, 0, 100, 20) and other.score == pytest.approx(inside[1] / 2, rel=2e-2)


def test_nothing_found_is_no_error(weights_dir: Path) -> None:
    detector = Detector(weights_dir / DETECTOR.path, torch.device("cpu"))
    empty = SimpleNamespace(
        class_queries_logits=torch.zeros(1, 3, 81), masks_queries_logits=torch.ones(1, 3, 9, 9)
    )
    detector.model = lambda pixel_values: empty  # type: ignore[assignment]
    assert detector.find(torch.zeros(3, 50, 50)) == {}


def test_another_detector_is_refused(weights_dir: Path, tmp_path: Path) -> None:
    path = weights_dir / DETECTOR.path
    state = torch.load(path)["state_dict"]
    other = {name: value for name, value in state.items() if "stages.1.blocks.1" not in name}
    other |= {
        "backbone.layer1.0.conv1.weight": torch.zeros(2),
        "panoptic_head.cls_embed.bias": torch.zeros(134),
    }
    torch.save({"state_dict": other}, tmp_path / "d.pth")
    (tmp_path / "config.json").write_text(path.with_name("config.json").read_text())
    with pytest.raises(ValueError, match=r"d.pth are of another architecture:\n  missing: ") as told:
        Detector(tmp_path / "d.pth", torch.device("cpu"))
    for words in ("layers.1.blocks.1", "and 13 more", "unknown: backbone.layer1.0", "is (134,), not (81,)"):
        assert words in str(told.value)
