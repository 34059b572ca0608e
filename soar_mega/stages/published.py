"""The settings of published trainers, by name: what their repositories set where they were read.

flow_grpo 9745241, GRPO-Guard (in flow_grpo) 2e2f712, DiffusionNFT 24af555, UniRL 1a7b501, Flow-Factory a0b2bc5,
DanceGRPO 15cc71d, MixGRPO e5cdd6a, verl-omni a1139ba. Recipes of `recipes/sd35_medium` start from them, docs/rl.md
compares them.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from soar_mega.stages.collecting_settings import CollectingConfig, DiffusionNftConfig, FlowGrpoConfig


class Published(NamedTuple):
    """A trainer's settings.

    Attributes:
        stage: with the rewards by the names that scorers have here.
        others: settings of the other groups, as overrides say them.
    """

    stage: CollectingConfig
    others: dict[str, Any]


def _others(
    global_batch_size: int,
    lr: float,
    *,
    weight_decay: float = 1e-4,
    text_length: int = 128,
    ema_interval: int = 0,
) -> dict[str, Any]:
    """Of the trainers for SD3.5-M: all train the same adapters by AdamW at a constant rate, on 512 pixels.

    ema_interval: steps between those of an EMA with the decay .9, warmed up; 0: there is none.
    """
    averaged = {
        "train.ema_decay": 0.9,
        "train.ema_update_interval": ema_interval,
        "train.ema_warm_up": True,
    }
    return {
        "train.global_batch_size": global_batch_size,
        "optimizer.lr": lr,
        "optimizer.weight_decay": weight_decay,
        "optimizer.clip_grad": 1.0,
        "lora.rank": 32,
        "lora.alpha": 64,
        "data.resolution": 512,
        "data.max_sequence_length": text_length,
    } | (averaged if ema_interval else {})


_FLOW_GRPO = FlowGrpoConfig(rewards={"ocr": 1.0})  # general_ocr_sd3; 1152 samples in two updates
_FLOW_GRPO_FAST = replace(
    _FLOW_GRPO,
    guidance_scale=1.0,
    variant="cps",
    eta=0.8,
    stochastic_steps="window",
    drawn_per="sample",  # theirs: per rank and forward
    clip_range=1e-5,
    kl_beta=0.0,
)
_GUARD = replace(
    _FLOW_GRPO,
    std_over="prompt",
    clip_range=2e-6,
    kl_beta=0.0,
    ratio="guard",
    divide_by_step=True,
)
_NFT = DiffusionNftConfig(rewards={"gen_eval_rl": 1.0})  # sd3_geneval; 1152 samples in one update
_UNIRL: dict[str, Any] = {
    "images_per_prompt": 16,
    "sigma_grid": "linear",
    "std_unbiased": True,
    "std_epsilon": 1e-8,
    "rewards": {"pick_score_rl": 1.0},
    "kl_beta": 0.0,
}
_FLOW_FACTORY: dict[str, Any] = {
    "sigma_grid": "linear",
    "std_epsilon": 1e-6,
    "std_epsilon_use": "floor",
    "rewards": {"pick_score_rl": 1.0},
    "kl_beta": 0.0,
}
_FLOW_FACTORY_GRPO = FlowGrpoConfig(
    **_FLOW_FACTORY,
    eta=0.8,
    stochastic_steps="random",
    num_stochastic_steps=2,
    stochastic_range=[1, 6],
    drawn_per="collection",
    drop_zero_advantages=False,
    kl="velocity",
)
_DANCE = FlowGrpoConfig(
    images_per_prompt=12,
    prompts_per_collection=16,  # one per GPU
    rewards={"hps": 1.0},
    sampling_steps=16,
    sigma_grid="linear",
    integer_timesteps=True,
    guidance_scale=3.5,  # FLUX is told it
    same_start=True,
    std_over="prompt",
    std_unbiased=True,
    std_epsilon=1e-8,
    kl_beta=0.0,
    variant="dance",
    eta=0.3,
    stochastic_steps="all_but_last",
    num_learned_steps=9,  # 60 % of 15
    drop_zero_advantages=False,
)

PUBLISHED: dict[str, Published] = {
    "flow_grpo_ocr": Published(_FLOW_GRPO, _others(576, 3e-4, ema_interval=8)),
    "flow_grpo_geneval": Published(
        replace(_FLOW_GRPO, rewards={"gen_eval_rl": 1.0}), _others(576, 3e-4, ema_interval=8)
    ),
    "flow_grpo_pickscore": Published(
        replace(_FLOW_GRPO, rewards={"pick_score_rl": 1.0}, kl_beta=0.01), _others(576, 3e-4, ema_interval=8)
    ),
    "flow_grpo_clipscore": Published(
        replace(_FLOW_GRPO, rewards={"clip_score": 1.0}, kl_beta=0.02, same_start=True),
        _others(576, 3e-4, ema_interval=8),
    ),
    "flow_grpo_geneval_fast": Published(
        replace(_FLOW_GRPO_FAST, rewards={"gen_eval_rl": 1.0}), _others(576, 3e-4, ema_interval=8)
    ),
    "flow_grpo_pickscore_fast": Published(
        replace(
            _FLOW_GRPO_FAST, images_per_prompt=18, prompts_per_collection=64, rewards={"pick_score_rl": 1.0}
        ),
        _others(576, 3e-4, ema_interval=8),
    ),
    "grpo_guard_ocr": Published(_GUARD, _others(576, 1e-4, ema_interval=8)),
    "grpo_guard_geneval": Published(
        replace(_GUARD, rewards={"gen_eval_rl": 1.0}), _others(576, 1e-4, ema_interval=8)
    ),
    "grpo_guard_pickscore": Published(
        replace(_GUARD, images_per_prompt=16, clip_range=4e-6, rewards={"pick_score_rl": 1.0}),
        _others(384, 1e-4, ema_interval=8),
    ),
    "diffusion_nft_geneval": Published(_NFT, _others(1152, 3e-4, ema_interval=1)),
    "diffusion_nft_pickscore": Published(
        replace(_NFT, rewards={"pick_score_rl": 1.0}), _others(1152, 3e-4, ema_interval=1)
    ),
    "diffusion_nft_hpsv2": Published(
        replace(_NFT, rewards={"hps": 1.0}), _others(1152, 3e-4, ema_interval=1)
    ),
    "diffusion_nft_ocr": Published(
        replace(
            _NFT,
            rewards={"ocr": 1.0},
            beta=0.1,
            old_decay_start=75,
            old_decay_rate=0.0075,
            old_decay_max=0.999,
        ),
        _others(576, 3e-4, ema_interval=1),
    ),
    "diffusion_nft_multi_reward": Published(
        replace(
            _NFT,
            rewards={"pick_score_rl": 1.0, "hps": 1.0, "clip_score": 1.0},
            beta=0.1,
            sampling_steps=25,
            num_levels=24,
        ),
        _others(1152, 3e-4, ema_interval=1),
    ),
    "unirl_grpo": Published(
        FlowGrpoConfig(
            **_UNIRL,
            guidance_scale=1.0,
            advantage_clip=None,
            stochastic_steps="random",
            drawn_per="collection",
            drop_zero_advantages=False,
            old_log_probabilities="replayed",
        ),
        _others(384, 3e-4, weight_decay=0.0, text_length=256),
    ),
    "unirl_nft": Published(
        DiffusionNftConfig(**_UNIRL, integer_timesteps=False, solver="euler", levels="first"),
        _others(768, 3e-4, text_length=256),
    ),
    "flow_factory_grpo": Published(_FLOW_FACTORY_GRPO, _others(576, 3e-4, text_length=256)),
    "flow_factory_grpo_fast": Published(
        replace(
            _FLOW_FACTORY_GRPO,
            images_per_prompt=18,
            prompts_per_collection=64,
            guidance_scale=1.0,
            variant="cps",
            num_stochastic_steps=3,
            stochastic_range=[0, 5],
        ),
        _others(576, 3e-4, text_length=256),
    ),
    "flow_factory_guard": Published(
        replace(_FLOW_FACTORY_GRPO, ratio="guard"), _others(576, 3e-4, text_length=256)
    ),
    "flow_factory_nft": Published(
        DiffusionNftConfig(
            **_FLOW_FACTORY,
            images_per_prompt=16,
            sampling_steps=14,
            integer_timesteps=False,
            std_over="prompt",
            solver="euler",
            levels="stratified",
            num_levels=4,
            old_decay_start=1,
        ),
        _others(768, 1e-4, text_length=256),
    ),
    "dance_grpo": Published(
        _DANCE,
        {
            "train.global_batch_size": 64,
            "optimizer.lr": 1e-5,
            "optimizer.weight_decay": 1e-4,
            "optimizer.clip_grad": 1.0,
            "data.resolution": 720,
        },
    ),
    "dance_grpo_lora": Published(
        replace(_DANCE, sampling_steps=12, num_learned_steps=6),
        {
            "train.global_batch_size": 96,
            "optimizer.lr": 3e-4,
            "optimizer.weight_decay": 1e-4,
            "optimizer.clip_grad": 1.0,
            "lora.rank": 128,
            "lora.alpha": 256,
            "data.resolution": 720,
        },
    ),
    "mix_grpo": Published(
        replace(
            _DANCE,
            prompts_per_collection=32,
            # UnifiedReward, their fourth, is a service of one's own
            rewards={"hps": 1 / 3, "image_reward": 1 / 3, "pick_score": 1 / 3},
            advantages_of="each",
            sampling_steps=25,
            variant="flow_sde",
            eta=0.7,
            stochastic_steps="sliding",
            num_stochastic_steps=4,
            stochastic_range=[0, 23],
            num_learned_steps=None,
        ),
        {
            "train.global_batch_size": 96,
            "optimizer.lr": 1e-5,
            "optimizer.weight_decay": 1e-4,
            "optimizer.clip_grad": 1.0,
            "data.resolution": 720,
        },
    ),
    "verl_omni_ocr": Published(
        replace(
            _FLOW_GRPO_FAST,
            images_per_prompt=8,
            prompts_per_collection=8,
            std_unbiased=True,
            drop_zero_advantages=False,
            old_log_probabilities="replayed",
        ),
        _others(32, 1e-4, text_length=256) | {"data.resolution": 384},
    ),
}
