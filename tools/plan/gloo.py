"""The model and the layouts of four processes by which the planner's order is compared with the measured one."""

from soar_mega.config import ModelConfig, ParallelConfig, Recipe, TrainConfig
from soar_mega.models.common.flops import Tokens, image_tokens
from soar_mega.models.common.micro_batches import recomputations
from soar_mega.models.family import presets, read_sizes
from soar_mega.stages import SoarConfig

STEPS = 5
POINTS = 4  # of a micro-batch
SHAPE, TEXT = (16, 16, 16), 32  # 64 tokens of the image
SIZES = read_sizes(
    presets()["sd35_medium"].to_diffusers()
    | {
        "num_layers": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 256,
        "dual_attention_layers": (0, 1, 2, 3),
        "joint_attention_dim": 256,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 16,
    }
)
TOKENS = Tokens(image_tokens(SIZES, SHAPE[1:]), TEXT)
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP = "virtual_pipeline_model_parallel_size"
LAYOUTS: dict[str, dict[str, object]] = {
    "DP4": {},
    "DP4 light recomputation": {},
    "DP4 full recomputation": {},
    "TP2 DP2": {TP: 2, "sequence_parallel": True},
    "TP4": {TP: 4, "sequence_parallel": True},
    "CP2 DP2": {CP: 2},
    "CP4": {CP: 4},
    "PP2 DP2": {PP: 2},
    "PP4": {PP: 4},
    "PP2 VPP2 DP2": {PP: 2, VPP: 2},
    "TP2 PP2": {TP: 2, PP: 2, "sequence_parallel": True},
    "DP4 ZeRO 1": {"engine": "deepspeed", "zero_stage": 1},
    "DP4 ZeRO 2": {"engine": "deepspeed", "zero_stage": 2},
    "DP4 ZeRO 3": {"engine": "deepspeed", "zero_stage": 3},
}


def recipe_of(layout: str) -> Recipe:
    """Eight samples a step, in micro-batches of four points."""
    none, light, full = recomputations(ModelConfig(preset="none", init="random", dtype="fp32"))
    return Recipe(
        model=light if "light" in layout else full if "full" in layout else none,
        stage=SoarConfig(num_auxiliary_points=3, shift=1.0),
        parallel=ParallelConfig(**LAYOUTS[layout]),  # type: ignore[arg-type]
        train=TrainConfig(
            global_batch_size=8, micro_batch_size=2, points_per_micro_batch=POINTS, cuda_graphs="none"
        ),
    )
