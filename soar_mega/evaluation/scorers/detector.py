"""GenEval's detector: Mask2Former with Swin-S on COCO's things, published by mmdetection, in transformers' class."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from soar_mega.evaluation.scorers.detector_keys import PIXELS, to_transformers
from soar_mega.evaluation.scorers.gen_eval_rules import CLASSES, THRESHOLD, Found
from soar_mega.evaluation.scorers.state import fill_model, read_json, read_state

# of mmdetection's test pipeline, on the scale of 0 to 255
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
PADDING = 128.0
LONG_EDGE, SHORT_EDGE = 1333, 800
DIVISOR = 32
MAX_DETECTIONS = 100


class Detector:
    """Finds objects in one image at a time."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Raises ValueError where the file does not hold that detector."""
        config = detector_config(path.parent)
        # Neither the last norm of the backbone nor the weights of the training loss serve a detection.
        unneeded = (f"{PIXELS}.encoder.swin.layernorm.", f"{PIXELS}.encoder.layernorm.", "criterion.")
        state = to_transformers(read_state(path))
        self.model = fill_model(Mask2FormerForUniversalSegmentation, config, state, path, device, unneeded)
        self.device = device

    def find(self, image: Tensor) -> dict[str, list[Found]]:
        """Everything that can count: of score above GenEval's lower threshold, by class.

        Args:
            image: [3, H, W] on the CPU, whole numbers from 0 to 255.
        """
        resized = resize(image)
        pixels = normalize(resized).to(self.device)
        answer = self.model(pixel_values=pixels)
        scores, labels, queries = best(answer.class_queries_logits[0])
        if not len(queries):
            return {}
        logits = interpolate(answer.masks_queries_logits[:, queries], pixels.shape[2:], mode="bilinear")
        logits = logits[:, :, : resized.shape[1], : resized.shape[2]]
        logits = interpolate(logits, image.shape[1:], mode="bilinear")[0]
        masks = logits > 0
        certainty = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
        found: dict[str, list[Found]] = {}
        for label, score, mask in zip(labels.tolist(), (scores * certainty).tolist(), masks.cpu()):
            found.setdefault(CLASSES[label], []).append(Found(box_of(mask), score, mask))
        return found


def best(class_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, classes and queries of the best pairs of those: [Q, classes + 1] -> three times [D].

    The share of a mask's certainty is still to be multiplied, so that what is below the threshold now stays there.
    """
    scores = class_logits.softmax(-1)[:, :-1]
    top, pairs = scores.flatten().topk(min(MAX_DETECTIONS, scores.numel()))
    pairs, top = pairs[top > THRESHOLD], top[top > THRESHOLD]
    return top, pairs % scores.shape[1], pairs // scores.shape[1]


def resize(image: Tensor) -> Tensor:
    """The shorter edge to 800 pixels, the longer to 1333 at most, in whole numbers."""
    height, width = image.shape[1:]
    scale = min(LONG_EDGE / max(height, width), SHORT_EDGE / min(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    return interpolate(image[None].float(), size, mode="bilinear")[0].round()


def normalize(image: Tensor) -> Tensor:
    """Grey margins at the right and below up to a multiple of 32, then the mean taken out: [1, 3, H', W']."""
    below, right = (-edge % DIVISOR for edge in image.shape[1:])
    padded = pad(image, (0, right, 0, below), value=PADDING)
    return ((padded - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))[None]


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the true pixels of [H, W], the last two one beyond; zeros where there are none."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1


def detector_config(folder: Path) -> Mask2FormerConfig:
    """The sizes of the published detector; a config.json in the folder says others."""
    path = folder / "config.json"
    if path.is_file():
        return Mask2FormerConfig.from_dict(read_json(path))
    swin = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(backbone_config=swin, num_labels=len(CLASSES))
