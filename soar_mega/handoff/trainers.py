"""What trainers of other repositories read of a pipeline folder, and how they are started on it.

Read in their code: flow_grpo ac4c86e, 9745241 and, for FLUX, 74db691 and 54809b5, DiffusionNFT 24af555, UniRL 1a7b501,
Flow-Factory a0b2bc5, verl-omni a1139ba. All of them train Stable Diffusion 3.5 with adapters, two of them FLUX.1 too.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Handoff:
    """A pipeline that is handed on.

    Attributes:
        kind: the class of the pipeline.
        pipeline: its absolute path; out: the absolute path of the folder for what the trainer writes.
        resolution: pixels along an edge; tokens: T5 tokens of a prompt, as trained.
        shift: of the scheduler.
    """

    kind: str
    pipeline: Path
    out: Path
    resolution: int
    tokens: int
    shift: float


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a trainer starts on pipelines of a class.

    Attributes:
        tokens: T5 tokens that it takes for a prompt; how_to_set: words that change it in its code, with {tokens}, where
            no setting does; "" where the lines below set it.
        pads_clips: to CLIP_TOKENS, whatever the tokenizer says.
        lines: the lines of a shell script, run in its repository.
    """

    tokens: int
    how_to_set: str
    pads_clips: bool = True
    lines: Callable[[Handoff], list[str]]


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A trainer of another repository.

    Attributes:
        repository: on GitHub.
        holds: the type in which it holds the frozen weights; keep: what in its settings keeps float32, "" if nothing.
        pins_old_tokenizers: it needs transformers 4.40, whose CLIP tokenizer reads vocab.json and merges.txt alone.
        adapters: the newest adapters that it leaves, below `out`, as `convert --lora` takes them; "": another form.
        starts: by the class of a pipeline.
    """

    name: str
    repository: str
    holds: str
    keep: str
    pins_old_tokenizers: bool
    adapters: str
    starts: Mapping[str, Start]


MARK = "written by soar-mega handoff"  # in the lines, so that a file of them may be replaced
CLIP_TOKENS = 77  # written into the code of those that pad to it
SD3, FLUX = "StableDiffusion3Pipeline", "FluxPipeline"


def _words(*parts: object) -> str:
    """A command with a line for each part after the first."""
    return " \\\n    ".join(str(part) for part in parts)


def _q(value: object) -> str:
    return shlex.quote(str(value))


def _configured(handoff: Handoff) -> tuple[str, str]:
    """Settings of flow_grpo's configuration, from which DiffusionNFT's was made."""
    return (
        f"--config.pretrained.model={_q(handoff.pipeline)}",
        f"--config.save_dir={_q(handoff.out)} --config.resolution={handoff.resolution}",
    )


def _tokens_in(scripts: str) -> str:
    """Words that change the T5 tokens in scripts of flow_grpo, with {tokens}; DiffusionNFT's were made from them."""
    return f"sed -i 's/max_sequence_length=128/max_sequence_length={{tokens}}/' {scripts}"


def _flow_grpo(handoff: Handoff) -> list[str]:
    return [
        "# prompts and rewards are the configuration's: general_ocr_sd3_4gpu here, or geneval_sd3, pickscore_sd3, ...",
        _words(
            "accelerate launch --config_file scripts/accelerate_configs/multi_gpu.yaml --num_processes 4",
            "--main_process_port 29501 scripts/train_sd3.py --config config/grpo.py:general_ocr_sd3_4gpu",
            *_configured(handoff),
        ),
    ]


def _flow_grpo_flux(handoff: Handoff) -> list[str]:
    return [
        "# prompts and rewards are the configuration's: pickscore_flux_8gpu here, or geneval_flux_fast, ...",
        _words(
            "accelerate launch --config_file scripts/accelerate_configs/deepspeed_zero2.yaml --num_processes 8",
            "--main_process_port 29501 scripts/train_flux.py --config config/grpo.py:pickscore_flux_8gpu",
            *_configured(handoff),
        ),
    ]


def _diffusion_nft(handoff: Handoff) -> list[str]:
    return [
        "# it samples without guidance: look first at what the model draws with --guidance-scale 1",
        _words(
            "torchrun --nproc_per_node=8 scripts/train_nft_sd3.py --config config/nft.py:sd3_multi_reward",
            *_configured(handoff),
        ),
    ]


def _unirl(handoff: Handoff) -> list[str]:
    return [
        "# diffusion/sd3_nft in the place of diffusion/sd3_trainside is DiffusionNFT",
        _words(
            "bash examples/run_experiment_single_node.sh diffusion/sd3_trainside",
            f"bundle.config.pretrained_model_ckpt_path={_q(handoff.pipeline)}",
            f"bundle.config.shift={handoff.shift:g} pipeline.shift={handoff.shift:g}",
            f"sampling.height={handoff.resolution} sampling.width={handoff.resolution}",
            f"+save_interval=100 +save_dir={_q(handoff.out)} +save_mode=adapter",
        ),
        "# a transformer folder with the adapters of a checkpoint in it:",
        f"# python -m unirl.tools.export_hf --checkpoint {_q(handoff.out)}/checkpoint-N --base {_q(handoff.pipeline)} "
        f"--subfolder transformer --output {_q(handoff.out)}/merged",
    ]


def _flow_factory(handoff: Handoff, model: str) -> list[str]:
    base, config = f"examples/grpo/lora/{model}/default.yaml", handoff.out / "flow_factory.yaml"
    changes = {
        "model_name_or_path": f'"{handoff.pipeline}"',
        "save_dir": f'"{handoff.out}"',
        "resolution": str(handoff.resolution),
    }
    edits = [f"s|^( *{key}:).*|\\1 {value}|" for key, value in changes.items()]
    return [
        f"# examples/nft/lora/{model}/default.yaml is DiffusionNFT",
        f"mkdir -p {_q(handoff.out)}",
        " ".join(["sed -E", *(f"-e {_q(edit)}" for edit in edits), f"{base} > {_q(config)}"]),
        f"ff-train {_q(config)}",
    ]


def _verl_omni(handoff: Handoff) -> list[str]:
    clip, t5 = (
        f"{{path: {path}, max_length: {most}}}"
        for path, most in (("tokenizer", CLIP_TOKENS), ("tokenizer_3", handoff.tokens))
    )
    tokenizers = f"{{clip: {clip}, t5: {t5}}}"
    rollout = "actor_rollout_ref.rollout"
    return [
        "# prompts come as parquet: examples/flowgrpo_trainer/data_process/sd3_ocr.py makes it",
        _words(
            "bash examples/flowgrpo_trainer/sd35/run_sd35_medium_ocr_lora.sh",
            f"actor_rollout_ref.model.path={_q(handoff.pipeline)}",
            _q(f"actor_rollout_ref.model.extra_tokenizers={tokenizers}"),
            f"{rollout}.pipeline.max_sequence_length={handoff.tokens}",
            f"{rollout}.max_prompt_embed_length={CLIP_TOKENS + handoff.tokens}",
            f"{rollout}.pipeline.height={handoff.resolution} {rollout}.pipeline.width={handoff.resolution}",
            f"trainer.default_local_dir={_q(handoff.out)}",
        ),
    ]


TRAINERS = {
    trainer.name: trainer
    for trainer in (
        Trainer(
            name="flow_grpo",
            repository="yifan123/flow_grpo",
            holds="fp32",
            keep="",
            pins_old_tokenizers=True,
            adapters="checkpoints/checkpoint-N",
            starts={
                SD3: Start(
                    tokens=128,
                    how_to_set=_tokens_in("scripts/train_sd3*.py"),
                    lines=_flow_grpo,
                ),
                FLUX: Start(
                    tokens=128,
                    how_to_set=_tokens_in("scripts/train_flux.py"),
                    lines=_flow_grpo_flux,
                ),
            },
        ),
        Trainer(
            name="diffusion_nft",
            repository="NVlabs/DiffusionNFT",
            holds="fp32",
            keep="",
            pins_old_tokenizers=True,
            adapters="checkpoints/checkpoint-N",
            starts={
                SD3: Start(
                    tokens=128,
                    how_to_set=_tokens_in("scripts/train_nft_sd3.py"),
                    lines=_diffusion_nft,
                )
            },
        ),
        Trainer(
            name="unirl",
            repository="Tencent-Hunyuan/UniRL",
            holds="bf16",
            keep="bundle.config.model_precision=fp32",
            pins_old_tokenizers=False,
            adapters="",
            starts={
                SD3: Start(
                    tokens=256,
                    how_to_set=(
                        "sed -i 's/max_sequence_length: int = 256/max_sequence_length: int = {tokens}/' "
                        "unirl/models/sd3/text_embed.py"
                    ),
                    lines=_unirl,
                )
            },
        ),
        Trainer(
            name="flow_factory",
            repository="X-GenGroup/Flow-Factory",
            holds="bf16",
            keep='mixed_precision: "no"',
            pins_old_tokenizers=False,
            adapters="RUN/checkpoints/checkpoint-N",
            starts={
                SD3: Start(
                    tokens=256,
                    how_to_set=(
                        "sed -i 's/prompt_3=prompt,/prompt_3=prompt, max_sequence_length={tokens},/' "
                        "src/flow_factory/models/stable_diffusion/sd3_5.py"
                    ),
                    lines=partial(_flow_factory, model="sd3_5"),
                    pads_clips=False,
                ),
                FLUX: Start(
                    tokens=512,
                    how_to_set=(
                        "sed -i 's/prompt_2=prompt,/prompt_2=prompt, max_sequence_length={tokens},/' "
                        "src/flow_factory/models/flux/flux1.py"
                    ),
                    lines=partial(_flow_factory, model="flux1"),
                    pads_clips=False,
                ),
            },
        ),
        Trainer(
            name="verl_omni",
            repository="verl-project/verl-omni",
            holds="bf16",
            keep="actor_rollout_ref.actor.fsdp_config.model_dtype=float32",
            pins_old_tokenizers=False,
            adapters="",
            starts={SD3: Start(tokens=256, how_to_set="", lines=_verl_omni)},
        ),
    )
}


def script(trainer: Trainer, handoff: Handoff) -> str:
    """The lines that start a trainer, for a file or a shell."""
    head = [
        f"# {MARK}: {trainer.name} on {handoff.pipeline}",
        f"# run it in a checkout of github.com/{trainer.repository}, in its environment",
    ]
    last = []
    if trainer.adapters:
        convert = ["soar-mega", "convert", handoff.pipeline, handoff.out / "pipeline", "--to", "pipeline"]
        words = " ".join(map(_q, [*convert, "--dtype", "fp32", "--lora", handoff.out / trainer.adapters]))
        last = ["# its adapters, in the pipeline:", f"# {words}"]
    return "\n".join([*head, *trainer.starts[handoff.kind].lines(handoff), *last]) + "\n"
