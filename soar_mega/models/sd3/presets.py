"""Published sizes, for runs and summaries without a pipeline folder."""

from soar_mega.models.sd3.sizes import SD3Sizes

PRESETS: dict[str, SD3Sizes] = {
    "sd35_medium": SD3Sizes(
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    "sd35_large": SD3Sizes(
        num_layers=38,
        num_attention_heads=38,
        attention_head_dim=64,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    ),
}
