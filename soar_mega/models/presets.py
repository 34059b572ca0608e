"""Published sizes, for runs and summaries without a pipeline folder."""

from soar_mega.config import ModelConfig
from soar_mega.models.config import MMDiTConfig

PRESETS: dict[str, MMDiTConfig] = {
    "sd35_medium": MMDiTConfig(
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    "sd35_large": MMDiTConfig(
        num_layers=38,
        num_attention_heads=38,
        attention_head_dim=64,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    ),
}


def model_sizes(model: ModelConfig) -> MMDiTConfig:
    """The sizes of the transformer that a recipe names.

    Raises:
        ValueError: a pipeline folder without an SD3 transformer, or an unknown preset.
    """
    if model.pipeline_dir:
        return MMDiTConfig.from_diffusers(model.pipeline_dir)
    if model.preset not in PRESETS:
        raise ValueError(f"model.preset: {model.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[model.preset]
