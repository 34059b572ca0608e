"""Tiny random weights in the files and of the classes of the published ones, so that every path runs without those.

Their values mean nothing.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BlipConfig, CLIPConfig, CLIPModel

from soar_mega.evaluation.scorers.heads import LinearHead
from soar_mega.evaluation.scorers.scorer_files import (
    AESTHETIC_HEAD,
    BERT_VOCABULARY,
    HPS_WEIGHTS,
    IMAGE_REWARD_WEIGHTS,
    LAION_CLIP,
    OPENAI_CLIP,
    PICK_SCORE,
)
from soar_mega.evaluation.scorers.tiny_detector import write_detector
from soar_mega.evaluation.scorers.tiny_state import Shapes, linear, norms, random_state, save_pickled

TEXT_LENGTH = 77
WIDTH = 32
LAYERS = 2
HEADS = 2
PATCH = 14
IMAGE = 28


def write_tiny_weights(name: str, weights_dir: Path) -> None:
    """All files that the scorer `name` reads, the same at every call."""
    WRITERS[name](weights_dir)


def replace_tiny_weights(names: Iterable[str], weights_dir: Path) -> None:
    """Those of all scorers among `names` that read files. Each file is there as a whole or not at all."""
    made = weights_dir / "new"
    shutil.rmtree(made, ignore_errors=True)
    for name in WRITERS.keys() & set(names):
        write_tiny_weights(name, made)
    for file in [path for path in made.rglob("*") if path.is_file()]:
        target = weights_dir / file.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    shutil.rmtree(made, ignore_errors=True)


def write_clip_l(weights_dir: Path) -> None:
    """OpenAI's CLIP."""
    write_clip(weights_dir / OPENAI_CLIP, tiny_clip_config("quick_gelu", 768))
    write_clip_tokenizer(weights_dir / OPENAI_CLIP)


def write_pick_score(weights_dir: Path) -> None:
    write_clip(weights_dir / PICK_SCORE[0].place, tiny_clip_config("gelu", 64))
    write_clip_tokenizer(weights_dir / LAION_CLIP)


def write_aesthetic(weights_dir: Path) -> None:
    write_clip_l(weights_dir)
    shapes = {name: tuple(value.shape) for name, value in LinearHead(768).state_dict().items()}
    save_pickled(random_state(shapes), weights_dir / AESTHETIC_HEAD.path)


def write_hps(weights_dir: Path) -> None:
    """The file of open_clip, inside a "state_dict" and in half precision as the published one."""
    path = weights_dir / HPS_WEIGHTS.path
    config = tiny_clip_config("gelu", 64)
    write_clip_tokenizer(weights_dir / LAION_CLIP)
    state = {name: value.half() for name, value in random_state(open_clip_shapes(config)).items()}
    save_pickled({"state_dict": state}, path)
    (path.parent / "config.json").write_text(json.dumps(config.to_dict()))


def write_image_reward(weights_dir: Path) -> None:
    path, vocabulary = weights_dir / IMAGE_REWARD_WEIGHTS.path, weights_dir / BERT_VOCABULARY.path
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,'\""]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary.parent.mkdir(parents=True, exist_ok=True)
    vocabulary.write_text("".join(f"{word}\n" for word in words))
    state = random_state(image_reward_shapes(len(words)))
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    save_pickled(state, path)
    (path.parent / "config.json").write_text(json.dumps(tiny_blip_config(len(words)).to_dict()))


def write_clip(folder: Path, config: CLIPConfig) -> None:
    """A CLIP of transformers: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: tuple(value.shape) for name, value in CLIPModel(config).state_dict().items()}
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(random_state(shapes), folder / "model.safetensors")


def write_clip_tokenizer(folder: Path) -> None:
    """Each byte is a token, and another one at the end of a word."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(tiny_clip_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def tiny_clip_vocabulary() -> dict[str, int]:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}


def tiny_clip_config(activation: str, projection: int) -> CLIPConfig:
    vocabulary = tiny_clip_vocabulary()
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": activation,
    }
    text = {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
    }
    vision = {"image_size": IMAGE, "patch_size": PATCH}
    return CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=projection)


def open_clip_shapes(config: CLIPConfig) -> Shapes:
    """Of a CLIP under open_clip's names."""
    text, dim = config.text_config, config.projection_dim
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": ((IMAGE // PATCH) ** 2 + 1, WIDTH),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "visual.proj": (WIDTH, dim),
        "token_embedding.weight": (text.vocab_size, WIDTH),
        "positional_embedding": (TEXT_LENGTH, WIDTH),
        "text_projection": (WIDTH, dim),
        "logit_scale": (),
        **norms("visual.ln_pre", "visual.ln_post", "ln_final", width=WIDTH),
    }
    for tower in ("visual.", ""):
        for layer in range(LAYERS):
            block = f"{tower}transformer.resblocks.{layer}"
            shapes |= norms(f"{block}.ln_1", f"{block}.ln_2", width=WIDTH)
            shapes |= {f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH)}
            shapes |= {f"{block}.attn.in_proj_bias": (3 * WIDTH,)}
            shapes |= linear(f"{block}.attn.out_proj", WIDTH, WIDTH)
            shapes |= linear(f"{block}.mlp.c_fc", 2 * WIDTH, WIDTH)
            shapes |= linear(f"{block}.mlp.c_proj", WIDTH, 2 * WIDTH)
    return shapes


def tiny_blip_config(vocabulary: int) -> BlipConfig:
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH}
    vision = {"hidden_size": WIDTH, "image_size": IMAGE, "patch_size": PATCH, "layer_norm_eps": 1e-6}
    text = {"vocab_size": vocabulary, "hidden_size": 2 * WIDTH, "encoder_hidden_size": WIDTH}
    text |= {"max_position_embeddings": 40, "bos_token_id": 2, "sep_token_id": 3}
    return BlipConfig(vision_config=sizes | vision, text_config=sizes | text)


def image_reward_shapes(vocabulary: int) -> Shapes:
    """Of ImageReward under its own names."""
    vision, text, width = "blip.visual_encoder", "blip.text_encoder", 2 * WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}.cls_token": (1, 1, WIDTH),
        f"{vision}.pos_embed": (1, (IMAGE // PATCH) ** 2 + 1, WIDTH),
        f"{vision}.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        f"{vision}.patch_embed.proj.bias": (WIDTH,),
        **norms(f"{vision}.norm", width=WIDTH),
        f"{text}.embeddings.word_embeddings.weight": (vocabulary, width),
        f"{text}.embeddings.position_embeddings.weight": (40, width),
        **norms(f"{text}.embeddings.LayerNorm", width=width),
        **linear("blip.vision_proj", 16, WIDTH),
    }
    for layer in range(LAYERS):
        block = f"{vision}.blocks.{layer}"
        shapes |= norms(f"{block}.norm1", f"{block}.norm2", width=WIDTH)
        shapes |= linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH) | linear(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}.mlp.fc1", 2 * WIDTH, WIDTH)
        shapes |= linear(f"{block}.mlp.fc2", WIDTH, 2 * WIDTH)
        block = f"{text}.encoder.layer.{layer}"
        for attention, read in (("attention", width), ("crossattention", WIDTH)):
            shapes |= linear(f"{block}.{attention}.self.query", width, width)
            shapes |= linear(f"{block}.{attention}.self.key", width, read)
            shapes |= linear(f"{block}.{attention}.self.value", width, read)
            shapes |= linear(f"{block}.{attention}.output.dense", width, width)
            shapes |= norms(f"{block}.{attention}.output.LayerNorm", width=width)
        shapes |= linear(f"{block}.intermediate.dense", 2 * WIDTH, width)
        shapes |= linear(f"{block}.output.dense", width, 2 * WIDTH)
        shapes |= norms(f"{block}.output.LayerNorm", width=width)
    head = LinearHead(width).state_dict()
    return shapes | {f"mlp.{name}": tuple(value.shape) for name, value in head.items()}


def write_gen_eval(weights_dir: Path) -> None:
    write_clip_l(weights_dir)
    write_detector(weights_dir)


WRITERS = {
    "gen_eval": write_gen_eval,
    "gen_eval_rl": write_gen_eval,
    "clip_score": write_clip_l,
    "pick_score": write_pick_score,
    "pick_score_rl": write_pick_score,
    "aesthetic": write_aesthetic,
    "hps": write_hps,
    "image_reward": write_image_reward,
}
