"""The settings of a run: typed groups, with their defaults. Names are Megatron's where Megatron has one.

The comment beside a setting, or above it, is what docs/settings.md says of it (tools/settings_page.py).
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Self

from soar_mega.rules import Rule, above, at_least


@dataclass(kw_only=True)
class ModelConfig:
    """Which transformer is trained, and how it computes."""

    pipeline_dir: str = ""  # diffusers pipeline folder: transformer/, vae/, text encoders, scheduler/
    # sd35_medium | sd35_large | flux_dev | flux_schnell: sizes without a folder; with one, what it must hold
    preset: str = ""
    init: str = "pretrained"  # pretrained: weights of pipeline/transformer; random: its sizes only
    dtype: str = "bf16"  # fp32 | bf16: parameters and activations; optimizer and gradients stay fp32
    transformer_impl: str = "local"  # the layers' linears: local (torch's) | transformer_engine
    attention_backend: str = (
        "sdpa"  # sdpa (torch's) | flash; with transformer_engine also auto | fused (cuDNN) | unfused
    )
    fp8: str | None = None  # e4m3 | hybrid (gradients in e5m2): the layers' matrix products in FP8; null: not
    fp8_recipe: str = "tensorwise"  # with fp8: what has a scale: tensorwise | delayed | blockwise | mxfp8
    first_last_layers_bf16: bool = False  # with fp8: the first and last layers stay in bf16
    num_layers_at_start_in_bf16: int = 1  # with first_last_layers_bf16: the first so many layers
    num_layers_at_end_in_bf16: int = 1  # with first_last_layers_bf16: the last so many layers
    # what is computed again in backward, not kept: none | selective (recompute_modules) | full (layers)
    recompute_granularity: str = "none"
    # with selective: any of core_attn | layernorm | mlp_act | qk_layernorm
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    recompute_every: int = 1  # with full: recompute every k-th layer
    fused_kernels: bool = True  # adaLN and QK norm as one kernel each; false: as plain torch calls

    @property
    def made_again(self) -> frozenset[str]:
        """Parts of every layer that are computed again in backward."""
        return frozenset(self.recompute_modules if self.recompute_granularity == "selective" else ())


class Forwards(NamedTuple):
    """Forwards of a sample, both branches of guidance counted; an average where samples differ."""

    answers: float  # without a gradient
    points: int  # with a backward
    query_branches: int = 1  # of the answers' forwards, those of one query: 2 where it is guided
    point_branches: int = 1  # likewise of a point


@dataclass(kw_only=True)
class StageConfig:
    """What every training method has; `soar_mega.stages` has a subclass for each, with its other settings.

    Attributes:
        rules: what its settings may be.
        collects: whether it learns from samples of its own, drawn for data.prompts.
    """

    name: str  # the training method; it says which other settings this group has
    # of the noise schedule, sigma = shift u / (1 + (shift - 1) u); null: that of the pipeline's scheduler
    shift: float | None = None
    guidance_scale: float = 3.5  # what a guidance-distilled model is told; another one is not

    rules: ClassVar[dict[str, Rule]] = {"shift": above(0), "guidance_scale": at_least(0)}
    collects: ClassVar[bool] = False

    def forwards(self) -> Forwards:
        """What a sample costs. Absent points are counted like the others: they are computed, with a weight of zero."""
        raise NotImplementedError

    @property
    def drawn_rows(self) -> int:
        """Rows of one forward that draws samples of its own."""
        return 0

    @property
    def drawing_forwards(self) -> float:
        """Forwards that drawing takes for each time that a sample is learned from."""
        return 0.0

    @property
    def kept_copies(self) -> tuple[str, ...]:
        """The copies of the weights that the method wants kept."""
        return ()

    def check(self, recipe: "Recipe") -> None:
        """Raise a ValueError that names the setting and what would be right, where its settings do not fit others."""

    def asking(self, is_told: bool) -> Self:
        """The settings as the method uses them: a model that is told the scale is asked once, not in two branches."""
        return replace(self, guidance_scale=1.0) if is_told else self


@dataclass(kw_only=True)
class ParallelConfig:
    """How the work is spread over processes; data parallelism takes what is left of the world."""

    engine: str = "megatron"  # megatron | deepspeed (no pipeline or context parallelism; ZeRO)
    tensor_model_parallel_size: int = 1  # ranks that the matrices of each layer are cut over
    pipeline_model_parallel_size: int = 1  # ranks that the layers are dealt out to, in order
    context_parallel_size: int = (
        1  # tokens of a sample are cut over this many ranks; in attention its heads are
    )
    virtual_pipeline_model_parallel_size: int | None = None  # model chunks per rank, interleaved; null: one
    decoder_first_pipeline_num_layers: int | None = None  # layers on the first rank; null: by their work
    decoder_last_pipeline_num_layers: int | None = None  # layers on the last rank; null: by their work
    # between matrices, activations are cut along tokens over the tensor parallel ranks
    sequence_parallel: bool = False
    # its states are cut over the replicas (ZeRO 1), with engine=megatron
    use_distributed_optimizer: bool = True
    # gradients are summed over replicas while backward goes on, with engine=megatron
    overlap_grad_reduce: bool = False
    # updated parameters travel while the next forward begins, with engine=megatron
    overlap_param_gather: bool = False
    overlap_rollout: bool = False  # the rollout's answers travel while the answer pass goes on, not after it
    zero_stage: int = (
        2  # with engine=deepspeed: 0 | 1 (optimizer) | 2 (and gradients) | 3 (and parameters are cut)
    )
    offload_optimizer: bool = False  # with engine=deepspeed: optimizer states and step on the CPU
    offload_parameters: bool = False  # with engine=deepspeed and zero_stage=3: parameters rest on the CPU

    @property
    def replica_size(self) -> int:
        """Processes that hold one replica of the model."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )


@dataclass(kw_only=True)
class TrainConfig:
    """The length and the pace of a run."""

    seed: int = 42  # of noise, noise levels, dropout and data order
    train_iters: int = 5000  # optimizer steps of the whole run, earlier starts included
    global_batch_size: int = 32  # samples per optimizer step, over all ranks
    micro_batch_size: int = 1  # samples per forward of the answer pass
    points_per_micro_batch: int | None = None  # points per training forward; null: micro_batch_size
    cuda_graphs: str = "layers"  # layers: each as a CUDA graph, on a GPU with the megatron engine | none
    ema_decay: float = 0.0  # of the moving average of the weights; 0: none is kept
    ema_update_interval: int = 1  # the EMA moves after every n-th step
    ema_warm_up: bool = False  # after n steps it moves with the decay min(n / (9 + n), ema_decay)
    offload_kept_weights: bool = False  # the EMA and the other copies that are kept lie in the host's memory
    exit_duration_in_mins: float | None = None  # save and exit 75 after this time; null: none
    step_timeout_minutes: float | None = (
        10.0  # a step that takes longer ends the run, with a report; null: any time
    )
    phase_timeout_minutes: float | None = (
        60.0  # likewise the start, measurements, a checkpoint, the export: each
    )
    max_skipped_steps: int = 10  # non-finite steps in a row before the run stops


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 2e-5  # learning rate after the warm-up
    min_lr: float = 0.0  # learning rate that a decay ends at
    lr_decay_style: str = "constant"  # constant (min_lr is not read) | cosine | linear
    lr_warmup_iters: int = 0  # steps of the linear warm-up; 0: none
    lr_decay_iters: int | None = None  # step at which the decay ends; null: train_iters
    # constant until this step, then the decay; null: right after the warm-up
    lr_decay_start: int | None = None
    weight_decay: float = 1e-2  # decoupled, as AdamW's: a step takes lr times this share of a weight away
    decay_all: bool = True  # decay biases and norms too, as the published recipes do
    adam_beta1: float = 0.9  # decay of the mean of gradients
    adam_beta2: float = 0.999  # decay of the mean of their squares
    adam_eps: float = 1e-8  # is added to the root of that mean
    clip_grad: float = 1.0  # largest norm of all gradients together; 0: any
    frozen: list[str] = field(default_factory=list)  # parameter name patterns (fnmatch) that are not trained
    # pattern -> factor on lr; the others have 1
    lr_multipliers: dict[str, float] = field(default_factory=dict)


# the linears that published post-training of SD3 and FLUX adapts (flow_grpo, DiffusionNFT)
LORA_TARGETS = (
    "*.attn.to_q",
    "*.attn.to_k",
    "*.attn.to_v",
    "*.attn.to_out.0",
    "*.attn.add_q_proj",
    "*.attn.add_k_proj",
    "*.attn.add_v_proj",
    "*.attn.to_add_out",
)


@dataclass(kw_only=True)
class LoraConfig:
    """Adapters that are trained in place of the weights."""

    rank: int = 0  # of an adapter's two matrices; 0: no adapters, the weights are trained
    alpha: float | None = None  # an adapter counts alpha / rank times; null: once
    dropout: float = 0.0  # share of a linear's input features that its adapter does without in a step
    # linears: patterns of diffusers' names
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    load: str = ""  # adapters to start from: a folder or file in PEFT's or diffusers' format; empty: new ones


@dataclass(kw_only=True)
class DataConfig:
    """Where samples come from."""

    path: str = (
        ""  # shards of `soar-mega prepare`: a folder, a url or a command; with encode=online an image folder
    )
    validation_path: str = ""  # held-out shards; empty: no validation, no drift during training
    encode: str = (
        "shards"  # shards (encoded before) | online (images and captions are encoded while training)
    )
    prompts: str = ""  # of stages that draw their samples: a .txt or .jsonl file, or a folder with train.txt
    validation_prompts: str = ""  # held-out ones, or a folder with test.txt; empty: no rewards of them
    prompt_cache: str = ""  # where the prompts' embeddings are kept; empty: in the run folder
    resolution: int | list[int] | None = (
        None  # pixels of what they draw, or [width, height]; null: the transformer's own
    )
    max_sequence_length: int | None = None  # T5 tokens of their prompts; null: as the pipeline's training
    cache_dir: str = ""  # for shards behind a url, which need it: a folder of each machine's own disk
    cache_gb: float = 100.0  # of shards in it, of all sets (10^9 bytes)
    num_workers: int = 0  # reader processes per data-parallel rank; 0: it reads by itself
    # samples that stop the run, as a share of those so far (at least an epoch): unreadable ones, or own ones not judged
    max_failed_share: float = 0.01


@dataclass(kw_only=True)
class CheckpointConfig:
    """The run folder: checkpoints, logs and the completion marker live in it."""

    save: str = ""  # the run folder, to be given; resumed from when it holds a checkpoint
    load: str = (
        ""  # another run folder to start from; the same as save: only to resume, if there is something
    )
    finetune: bool = False  # with load: take the weights alone, start at iteration 0
    load_ema: bool = False  # with finetune: start from the EMA weights
    save_interval: int = 500  # steps between checkpoints
    async_save: bool = True  # write while training goes on
    keep_last: int = 3  # newest checkpoints kept; 0 keeps all
    save_retain_interval: int = 0  # those of each n-th iteration are kept for ever as well; 0: none
    export: bool = True  # at the end write export/ (and export_ema/), diffusers pipeline folders
    export_dtype: str = "model"  # of their transformer: model | bf16 | fp32, the optimizer's own numbers


@dataclass(kw_only=True)
class LoggingConfig:
    """What is measured while training, and how often. Intervals are in steps; 0: never."""

    log_interval: int = 10  # steps between log lines
    peak_tflops: float | None = (
        None  # of a GPU, which MFU is a share of; null: as its data sheet says, where known
    )
    loss_spike_factor: float = 20.0  # a base loss this many deviations above the last 100 is logged; 0: none
    straggler_factor: float = 1.5  # warn of a rank whose own work takes this times the median; 0: never
    tensorboard: bool = True  # events go to <save>/tensorboard
    # validation loss by sigma quartile, and rewards of data.validation_prompts; 0: never
    eval_interval: int = 0
    eval_samples: int = 64  # held-out samples, or prompts, of an evaluation
    drift_interval: int = 0  # error of the velocity where the model's own sampling leads, on held-out samples
    drift_samples: int = 32  # held-out samples of a measurement
    drift_spans: list[list[float]] = field(  # [sigma from, sigma to] of the sampling that is measured
        default_factory=lambda: [[0.9, 0.65], [0.75, 0.5], [0.5, 0.25]]
    )
    drift_steps: int = 5  # guided Euler steps of a span
    collection_interval: int = 1  # collections between pictures of their best, median and worst samples
    sample_interval: int = 0  # pictures drawn for sample_prompts
    sample_prompts: list[str] = field(default_factory=list)  # prompts of these pictures
    sample_steps: int = 20  # sampling steps of these pictures, and of those that held-out rewards judge
    sample_guidance_scale: float = 4.5  # likewise the guidance scale, which drift has too


@dataclass(kw_only=True)
class Recipe:
    """All groups of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    stage: StageConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
