"""A tiny random detector in the file format and of the class of GenEval's."""

import json
from pathlib import Path

from transformers import Mask2FormerConfig, SwinConfig

from soar_mega.evaluation.scorers.gen_eval_rules import CLASSES
from soar_mega.evaluation.scorers.scorer_files import DETECTOR
from soar_mega.evaluation.scorers.tiny_state import Shapes, linear, norms, random_state, save_pickled

EMBED = 8
DEPTHS = (1, 2, 1, 1)
HEADS = (1, 2, 2, 4)
WINDOW = 7
WIDTH = 32  # 32 groups are normalised
ENCODER_LAYERS = 1
DECODER_LAYERS = 3
QUERIES = 10
ATTENTION_HEADS, LEVELS, POINTS = 8, 3, 4


def write_detector(weights_dir: Path) -> None:
    """mmdetection's checkpoint, with its "meta", and the sizes beside it."""
    path = weights_dir / DETECTOR.path
    state = random_state(detector_shapes())
    # Queries that differ, and are sure enough for some detections to count.
    state["panoptic_head.query_feat.weight"] *= 10
    state["panoptic_head.cls_embed.weight"] *= 10
    save_pickled({"meta": {"CLASSES": CLASSES}, "state_dict": state}, path)
    (path.parent / "config.json").write_text(json.dumps(tiny_detector_config().to_dict()))


def tiny_detector_config() -> Mask2FormerConfig:
    swin = SwinConfig(
        embed_dim=EMBED,
        depths=list(DEPTHS),
        num_heads=list(HEADS),
        window_size=WINDOW,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(
        backbone_config=swin,
        num_labels=len(CLASSES),
        feature_size=WIDTH,
        mask_feature_size=WIDTH,
        hidden_dim=WIDTH,
        encoder_feedforward_dim=WIDTH,
        dim_feedforward=WIDTH,
        encoder_layers=ENCODER_LAYERS,
        decoder_layers=DECODER_LAYERS + 1,  # transformers counts the prediction before the first
        num_queries=QUERIES,
    )


def detector_shapes() -> Shapes:
    """Under mmdetection's names."""
    return {**_backbone(), **_pixel_decoder(), **_transformer_decoder()}


def _backbone() -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.patch_embed.projection.weight": (EMBED, 3, 4, 4),
        "backbone.patch_embed.projection.bias": (EMBED,),
        **norms("backbone.patch_embed.norm", width=EMBED),
    }
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS)):
        width = EMBED * 2**stage
        for layer in range(depth):
            block = f"backbone.stages.{stage}.blocks.{layer}"
            attention = f"{block}.attn.w_msa"
            shapes |= norms(f"{block}.norm1", f"{block}.norm2", width=width)
            shapes |= linear(f"{attention}.qkv", 3 * width, width) | linear(f"{attention}.proj", width, width)
            shapes |= {f"{attention}.relative_position_bias_table": ((2 * WINDOW - 1) ** 2, heads)}
            shapes |= {f"{attention}.relative_position_index": (WINDOW**2, WINDOW**2)}
            shapes |= linear(f"{block}.ffn.layers.0.0", 4 * width, width)
            shapes |= linear(f"{block}.ffn.layers.1", width, 4 * width)
        shapes |= norms(f"backbone.norm{stage}", width=width)
        if stage < len(DEPTHS) - 1:
            merge = f"backbone.stages.{stage}.downsample"
            shapes |= norms(f"{merge}.norm", width=4 * width)
            shapes |= {f"{merge}.reduction.weight": (2 * width, 4 * width)}
    return shapes


def _pixel_decoder() -> Shapes:
    decoder = "panoptic_head.pixel_decoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{decoder}.level_encoding.weight": (LEVELS, WIDTH),
        f"{decoder}.lateral_convs.0.conv.weight": (WIDTH, EMBED, 1, 1),
        f"{decoder}.output_convs.0.conv.weight": (WIDTH, WIDTH, 3, 3),
        f"{decoder}.mask_feature.weight": (WIDTH, WIDTH, 1, 1),
        f"{decoder}.mask_feature.bias": (WIDTH,),
        **norms(f"{decoder}.lateral_convs.0.gn", f"{decoder}.output_convs.0.gn", width=WIDTH),
    }
    for level in range(LEVELS):
        conv = f"{decoder}.input_convs.{level}"
        shapes |= {f"{conv}.conv.weight": (WIDTH, EMBED * 2 ** (3 - level), 1, 1)}
        shapes |= {f"{conv}.conv.bias": (WIDTH,)} | norms(f"{conv}.gn", width=WIDTH)
    samples = ATTENTION_HEADS * LEVELS * POINTS
    for layer in range(ENCODER_LAYERS):
        block = f"{decoder}.encoder.layers.{layer}"
        attention = f"{block}.attentions.0"
        shapes |= linear(f"{attention}.sampling_offsets", 2 * samples, WIDTH)
        shapes |= linear(f"{attention}.attention_weights", samples, WIDTH)
        shapes |= linear(f"{attention}.value_proj", WIDTH, WIDTH)
        shapes |= linear(f"{attention}.output_proj", WIDTH, WIDTH)
        shapes |= norms(f"{block}.norms.0", f"{block}.norms.1", width=WIDTH)
        shapes |= linear(f"{block}.ffns.0.layers.0.0", WIDTH, WIDTH)
        shapes |= linear(f"{block}.ffns.0.layers.1", WIDTH, WIDTH)
    return shapes


def _transformer_decoder() -> Shapes:
    head = "panoptic_head"
    shapes: dict[str, tuple[int, ...]] = {
        f"{head}.query_embed.weight": (QUERIES, WIDTH),
        f"{head}.query_feat.weight": (QUERIES, WIDTH),
        f"{head}.level_embed.weight": (LEVELS, WIDTH),
        **norms(f"{head}.transformer_decoder.post_norm", width=WIDTH),
        **linear(f"{head}.cls_embed", len(CLASSES) + 1, WIDTH),
    }
    for layer in (0, 2, 4):
        shapes |= linear(f"{head}.mask_embed.{layer}", WIDTH, WIDTH)
    for layer in range(DECODER_LAYERS):
        block = f"{head}.transformer_decoder.layers.{layer}"
        for attention in (0, 1):
            name = f"{block}.attentions.{attention}.attn"
            shapes |= {f"{name}.in_proj_weight": (3 * WIDTH, WIDTH), f"{name}.in_proj_bias": (3 * WIDTH,)}
            shapes |= linear(f"{name}.out_proj", WIDTH, WIDTH)
        shapes |= norms(*(f"{block}.norms.{place}" for place in range(3)), width=WIDTH)
        shapes |= linear(f"{block}.ffns.0.layers.0.0", WIDTH, WIDTH)
        shapes |= linear(f"{block}.ffns.0.layers.1", WIDTH, WIDTH)
    return shapes
