"""CLIPScore, PickScore, HPS, the aesthetic score and ImageReward against their formulas in float64."""

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BlipVisionModel, CLIPModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from soar_mega.evaluation.scorer import Scorer
from soar_mega.evaluation.scorers import make_scorer
from soar_mega.evaluation.scorers.hps import cleaned, clip_h_config
from soar_mega.evaluation.scorers.image_reward import blip_configs
from soar_mega.evaluation.scorers.scorer_files import (
    AESTHETIC_HEAD,
    HPS_WEIGHTS,
    IMAGE_REWARD_WEIGHTS,
    LAION_CLIP,
    OPENAI_CLIP,
    PICK_SCORE,
)
from soar_mega.evaluation.scorers.state import read_state

PROMPTS = ["a red fox", "two 12 hats and a very long tale " * 4 + "end", "x"]
LEARNED = ["clip_score", "pick_score", "pick_score_rl", "hps", "aesthetic", "image_reward"]
Formula = Callable[[Path, Tensor, str], float]


def middle(image: Tensor, left: int, top: int, size: int = 28) -> Tensor:
    return image[:, top : top + size, left : left + size]


def clip_score(weights: Path, image: Tensor, prompt: str) -> float:
    clip = by_hand.Clip(load_file(weights / OPENAI_CLIP / "model.safetensors"), by_hand.quick_gelu)
    pixels = middle(by_hand.resized_tensor(image, 43, 28, "bilinear"), 8, 0)  # a margin of 15: 7.5 to even
    tokens = by_hand.clip_tokens(weights / OPENAI_CLIP, prompt)
    return (clip.image(by_hand.normalized(pixels)) @ clip.text(tokens)).item()


def pick_score(weights: Path, image: Tensor, prompt: str) -> float:
    state = load_file(weights / PICK_SCORE[0].place / "model.safetensors")
    clip = by_hand.Clip(state, by_hand.gelu)
    pixels = middle(by_hand.resized_by_pil(image, 43, 28), 7, 0)
    tokens = by_hand.clip_tokens(weights / LAION_CLIP, prompt)
    cosine = clip.image(by_hand.normalized(pixels)) @ clip.text(tokens)
    return (state["logit_scale"].double().exp() * cosine).item()


def hps(weights: Path, image: Tensor, prompt: str) -> float:
    clip = by_hand.OpenClip(torch.load(weights / HPS_WEIGHTS.path)["state_dict"])
    rounded = (image * 255).round() / 255
    small = by_hand.resized_tensor(rounded, 28, 18, "bicubic")  # 41 x 28 / 64 = 17.9
    pixels = torch.cat([torch.zeros(3, 5, 28), small, torch.zeros(3, 5, 28)], 1)
    tokens = by_hand.clip_tokens(weights / LAION_CLIP, prompt)
    return (clip.image(by_hand.normalized(pixels)) @ clip.text(tokens)).item()


def aesthetic(weights: Path, image: Tensor, prompt: str) -> float:
    clip = by_hand.Clip(load_file(weights / OPENAI_CLIP / "model.safetensors"), by_hand.quick_gelu)
    pixels = middle(by_hand.resized_by_pil(image, 43, 28), 7, 0)
    state = torch.load(weights / AESTHETIC_HEAD.path)
    return by_hand.head(state, "", clip.image(by_hand.normalized(pixels)))


def image_reward(weights: Path, image: Tensor, prompt: str) -> float:
    pixels = middle(by_hand.resized_by_pil(image, 43, 28), 8, 0)
    words = (weights / "google-bert/bert-base-uncased/vocab.txt").read_text().split()
    pieces = [
        ("##" if place else "") + letter for word in prompt.split() for place, letter in enumerate(word)
    ]
    tokens = [words.index(word) for word in ["[CLS]", *pieces[:33], "[SEP]"]]
    state = torch.load(weights / IMAGE_REWARD_WEIGHTS.path)
    return by_hand.image_reward(state, by_hand.normalized(pixels), tokens)


FORMULAS: dict[str, Formula] = {
    "clip_score": clip_score,
    "pick_score": pick_score,
    "pick_score_rl": lambda weights, image, prompt: pick_score(weights, image, prompt) / 26,
    "hps": hps,
    "aesthetic": aesthetic,
    "image_reward": image_reward,
}


def scores(scorer: Scorer, images: Tensor, prompts: list[str]) -> Tensor:
    return scorer.score(images, prompts, [{}] * len(prompts))[scorer.name]


@pytest.mark.parametrize("name", LEARNED)
def test_it_is_the_published_formula_alone_or_in_a_batch(
    name: str, weights_dir: Path, images: Tensor
) -> None:
    scorer = make_scorer(name, weights_dir)
    together = scores(scorer, images, PROMPTS)
    assert together.dtype == torch.float64 and scorer.name == name and len(scorer.weights_hash) == 64
    expected = [FORMULAS[name](weights_dir, image, prompt) for image, prompt in zip(images, PROMPTS)]
    assert together.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    del scorer
    again = make_scorer(name, weights_dir)  # as after a restart
    alone = [scores(again, images[i : i + 1], PROMPTS[i : i + 1]) for i in (2, 0, 1)]
    assert torch.equal(torch.cat([alone[1], alone[2], alone[0]]), together)


def test_scorers_of_one_clip_hold_it_once(weights_dir: Path) -> None:
    one, other, another = (
        make_scorer(name, weights_dir) for name in ("clip_score", "aesthetic", "pick_score")
    )
    assert one.clip is other.clip is not another.clip  # type: ignore[attr-defined]
    gone = weakref.ref(one.clip)  # type: ignore[attr-defined]
    del one, other
    assert gone() is None


def test_an_image_that_cannot_be_judged(weights_dir: Path, images: Tensor) -> None:
    scorer = make_scorer("clip_score", weights_dir)
    broken = images.clone()
    broken[1, 0, 3, 3] = torch.nan
    values = scores(scorer, broken, PROMPTS)
    assert values.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"in \[0, 1\], not from .* to 255"):
        scores(scorer, images * 0 + 255, PROMPTS)


def test_the_published_sizes_are_known_without_a_config(tmp_path: Path) -> None:
    """Heads, activations and small constants cannot be seen from weights."""
    clip = clip_h_config(tmp_path)
    towers = clip.vision_config, clip.text_config
    assert [tower.num_attention_heads for tower in towers] == [16, 16]
    assert {(tower.hidden_act, tower.layer_norm_eps) for tower in towers} == {("gelu", 1e-5)}
    vision, text = blip_configs(tmp_path)
    assert (vision.num_attention_heads, text.num_attention_heads) == (16, 12)
    assert (vision.layer_norm_eps, text.layer_norm_eps) == (1e-6, 1e-12)
    assert (vision.hidden_act, text.hidden_act, vision.image_size) == ("gelu", "gelu", 224)
    with torch.device("meta"):
        models = CLIPModel(clip), BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
    sizes = [sum(each.numel() for each in model.parameters()) for model in models]
    assert sizes[0] == 986_109_441  # open_clip's ViT-H-14
    assert sizes[1] + sizes[2] == 445_278_720  # in float32 with the head the 1.79 GB of the published file


def test_open_clip_cleans_a_prompt(weights_dir: Path, images: Tensor) -> None:
    dirty = "an astronaut\u2019s &amp;quot;glove&quot;\uff0c 50\uff4d\uff4d"
    assert cleaned(dirty) == 'an astronaut\'s "glove", 50mm'
    both = scores(make_scorer("hps", weights_dir), images[[0, 0]], [dirty, 'an astronaut\'s "glove", 50mm'])
    assert both[0] == both[1]


@pytest.mark.parametrize("damage", ["missing", "truncated", "shape", "other", "vocabulary"])
@pytest.mark.parametrize("name", ["clip_score", "hps"])
def test_weights_that_do_not_fit_are_refused_before_the_first_image(
    damage: str, name: str, weights_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(weights_dir, tmp_path / "weights")
    path = folder / (f"{OPENAI_CLIP}/model.safetensors" if name == "clip_score" else HPS_WEIGHTS.path)
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)["state_dict"]
    save = save_file if path.suffix == ".safetensors" else torch.save
    layer = next(key for key in state if key.endswith(("mlp.fc1.weight", "mlp.c_fc.weight")))
    match damage:
        case "missing":
            path.unlink()
            words = "lacks\n"
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
            words = "cannot be read"
        case "shape":
            save(state | {layer: torch.zeros(3, 4)}, path)
            words = r"another architecture:\n  shape of .*fc1.weight is \(3, 4\), not \(64, 32\)"
        case "other":
            save({"encoder.conv.weight": torch.zeros(2)} | {layer: state[layer]}, path)
            words = r"another architecture:\n  missing: .*"
        case _:
            place = OPENAI_CLIP if name == "clip_score" else LAION_CLIP
            (folder / place / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
            words = "has 2 tokens"
    with pytest.raises(ValueError, match=words) as told:
        make_scorer(name, folder)
    assert path.name in str(told.value)


def test_a_file_of_something_else_is_refused(weights_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights_dir, tmp_path / "weights")
    torch.save({"epoch": 3}, folder / HPS_WEIGHTS.path)
    with pytest.raises(ValueError, match="HPS_v2.1_compressed.pt holds no state dict"):
        make_scorer("hps", folder)
    # a pointer, not the file
    (folder / HPS_WEIGHTS.path).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="HPS_v2.1_compressed.pt is no file of weights"):
        make_scorer("hps", folder)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this ran",)


def test_numbers_of_numpy_beside_the_weights_are_no_danger(tmp_path: Path) -> None:
    """But what would run code is."""
    path = tmp_path / "weights.pth"
    weights = {"state_dict": {"a": torch.ones(2)}}
    torch.save(weights | {"meta": {"best": np.float64(0.5), "iteration": np.int64(3)}}, path)
    assert read_state(path)["a"].tolist() == [1, 1]
    torch.save(weights | {"meta": Harmful()}, path)
    with pytest.raises(ValueError, match="weights.pth is no file of weights, or holds more than numbers"):
        read_state(path)


def test_all_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)PickScore_v1/config.json.*PickScore_v1/model.safe.*merges.txt"
    ):
        make_scorer("pick_score", tmp_path)
    with pytest.raises(ValueError, match="no scorer 'pickscore'; there are clip_score, ocr"):
        make_scorer("pickscore", tmp_path)
