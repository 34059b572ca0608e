"""Whether a pipeline folder is what a trainer of another repository reads."""

from dataclasses import dataclass
from pathlib import Path

from soar_mega.convert import pipeline_parts, scheduler_shift
from soar_mega.convert.safetensors_reader import Reader
from soar_mega.convert.save import NAMES
from soar_mega.convert.weight_files import INDEX, SINGLE
from soar_mega.data.encoder_facts import class_name, encoder_facts
from soar_mega.handoff.trainers import CLIP_TOKENS, FLUX, SD3, TRAINERS, Handoff, Start, Trainer
from soar_mega.training_facts import TrainingFacts, read_facts
from soar_mega.user_files import number, read_object, whole

SHARED = {
    "vae": ("AutoencoderKL",),
    "tokenizer": ("CLIPTokenizer",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
CLASSES = {  # of each pipeline's parts
    SD3: SHARED
    | {
        "transformer": ("SD3Transformer2DModel",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer_2": ("CLIPTokenizer",),
        "tokenizer_3": ("T5TokenizerFast", "T5Tokenizer"),
    },
    FLUX: SHARED
    | {
        "transformer": ("FluxTransformer2DModel",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer_2": ("T5TokenizerFast", "T5Tokenizer"),
    },
}
UNKNOWN_RESOLUTION = 512  # what they draw where nothing else is said


@dataclass(frozen=True)
class Finding:
    """Something that the trainer will stop at (stops), or that changes what it does."""

    stops: bool
    words: str


def check(pipeline: Path, trainer: Trainer) -> list[Finding]:
    """What is wrong with a pipeline folder, and what to do about it; those that stop the trainer come first."""
    found = [Finding(True, words) for words in _missing(pipeline, trainer)]
    if found:
        return found  # the rest would be told of files that are not there
    facts, kind = read_facts(pipeline), _kind(pipeline)
    start = trainer.starts[kind]
    found = [
        *_classes(pipeline, kind),
        *_tokenizers(pipeline, kind, trainer),
        *_positions(pipeline, kind, start),
        *_scheduler(pipeline, kind),
        *_texts(facts, trainer.name, start),
        *_numbers(pipeline, facts, trainer),
        *_size(facts),
    ]
    return sorted(found, key=lambda finding: not finding.stops)


def handoff(pipeline: Path, out: Path) -> Handoff:
    """What the trainer's lines are made of. ValueError where a configuration is damaged."""
    facts = read_facts(pipeline) or TrainingFacts(dtype="fp32")
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    return Handoff(
        kind=_kind(pipeline),
        pipeline=pipeline.absolute(),
        out=out.absolute(),
        resolution=facts.width or _drawn_by_default(pipeline),
        tokens=facts.max_sequence_length or 256,
        shift=number({"shift": 1.0, **read_object(scheduler)}, "shift", scheduler),
    )


def _kind(pipeline: Path) -> str:
    """The class that its model_index.json names."""
    return str(read_object(pipeline / "model_index.json").get("_class_name"))


def _missing(pipeline: Path, trainer: Trainer) -> list[str]:
    try:
        pipeline_parts(pipeline)
        kind = _kind(pipeline)
    except (ValueError, OSError) as error:
        return [str(error)]
    if kind not in CLASSES:
        return [f"{pipeline} is a {kind}: what is handed on here is a {' or a '.join(CLASSES)}"]
    if kind not in trainer.starts:
        others = " and ".join(name for name, other in TRAINERS.items() if kind in other.starts)
        return [f"{trainer.name} does not train a {kind} (of the version that was read): {others} do"]
    try:
        lacking = [part for part in CLASSES[kind] if class_name(pipeline, part) is None]
    except ValueError as error:
        return [str(error)]
    if lacking:
        return [f"{pipeline} does without {', '.join(lacking)}, which the trainer loads: copy them into it"]
    weights = pipeline / "transformer"
    if not any((weights / name).is_file() for name in (SINGLE, INDEX)):
        return [
            f"{weights} holds no weights under the plain name {SINGLE}, and the trainer asks for no variant: "
            f"soar-mega convert {pipeline} OUT --to pipeline"
        ]
    return []


def _classes(pipeline: Path, kind: str) -> list[Finding]:
    return [
        Finding(True, f"model_index.json: {part} is a {found}, the trainer loads a {' or '.join(known)}")
        for part, known in CLASSES[kind].items()
        if (found := class_name(pipeline, part)) not in known
    ]


def _tokenizers(pipeline: Path, kind: str, trainer: Trainer) -> list[Finding]:
    found = []
    for part in _parts(kind, "tokenizer", "CLIP"):
        lacking = [name for name in ("vocab.json", "merges.txt") if not (pipeline / part / name).is_file()]
        if lacking:
            words = (
                f"{part}/ lacks {' and '.join(lacking)}, which transformers 4 reads: copy them from the model "
                "that the pipeline was made of"
            )
            found.append(Finding(trainer.pins_old_tokenizers, words))
    [t5] = _parts(kind, "tokenizer", "T5")
    if class_name(pipeline, t5) == "T5Tokenizer" and not (pipeline / t5 / "spiece.model").is_file():
        words = (
            f"{t5} is a T5Tokenizer without spiece.model, which transformers 4 reads: with a tokenizer.json name "
            "it T5TokenizerFast in model_index.json"
        )
        found.append(Finding(trainer.pins_old_tokenizers, words))
    return found


def _parts(kind: str, prefix: str, model: str) -> list[str]:
    """Tokenizers or text encoders of a pipeline that belong to a CLIP, or to the T5."""
    return [
        part
        for part, known in CLASSES[kind].items()
        if part.startswith(prefix) and known[0].startswith(model)
    ]


def _positions(pipeline: Path, kind: str, start: Start) -> list[Finding]:
    found = []
    for part in _parts(kind, "text_encoder", "CLIP"):
        path = pipeline / part / "config.json"
        config = {"max_position_embeddings": CLIP_TOKENS, **read_object(path)}
        positions = whole(config, "max_position_embeddings", path)
        if positions < CLIP_TOKENS and start.pads_clips:
            words = f"{part} has {positions} positions, and the trainer pads to {CLIP_TOKENS} tokens: it fails there"
            found.append(Finding(True, words))
    length = read_object(pipeline / "tokenizer" / "tokenizer_config.json").get(
        "model_max_length", CLIP_TOKENS
    )
    if length != CLIP_TOKENS and start.pads_clips:
        words = (
            f"tokenizer says {length} tokens, with which this model was trained, and the trainer takes {CLIP_TOKENS}: "
            "the model sees padding that it does not know"
        )
        found.append(Finding(False, words))
    return found


def _scheduler(pipeline: Path, kind: str) -> list[Finding]:
    config = read_object(pipeline / "scheduler" / "scheduler_config.json")
    if config.get("use_dynamic_shifting") and kind == SD3:  # all of them give FLUX its mu
        return [Finding(True, "scheduler: use_dynamic_shifting needs a mu that the trainer does not give")]
    try:
        scheduler_shift(pipeline, tokens=1)
    except ValueError as error:
        return [Finding(False, f"scheduler: {error}")]
    return []


def _texts(facts: TrainingFacts | None, name: str, start: Start) -> list[Finding]:
    if facts is None or facts.max_sequence_length is None:
        words = (
            f"nothing says with how many T5 tokens this model was trained; {name} takes {start.tokens}. "
            "Padding is attended to, so that another number is another model"
        )
        return [Finding(False, words)]
    tokens = facts.max_sequence_length
    if tokens == start.tokens or not start.how_to_set:
        return []
    words = (
        f"trained with {tokens} T5 tokens, and {name} takes {start.tokens}. In its repository: "
        f"{start.how_to_set.format(tokens=tokens)} (or train with soar-mega prepare --max-sequence-length "
        f"{start.tokens})"
    )
    return [Finding(False, words)]


def _numbers(pipeline: Path, facts: TrainingFacts | None, trainer: Trainer) -> list[Finding]:
    with Reader(pipeline / "transformer") as reader:
        types = {NAMES[reader.dtype(key)] for key in reader.files}
    if types != {"fp32"}:
        words = (
            f"the transformer is {' and '.join(sorted(types))}, rounded from float32: checkpoint.export_dtype=fp32, or "
            "soar-mega convert RUN OUT --dtype fp32, keeps what a short training changed"
        )
        return [Finding(False, words)] if facts is not None else []
    if trainer.holds != "fp32":
        return [
            Finding(
                False,
                f"{trainer.name} rounds the weights to {trainer.holds} when it loads: {trainer.keep} keeps them",
            )
        ]
    return []


def _size(facts: TrainingFacts | None) -> list[Finding]:
    if facts is not None and facts.width != facts.height:
        words = (
            f"trained on {facts.width} x {facts.height} pixels for the most part; the lines below draw squares of "
            f"{facts.width}"
        )
        return [Finding(False, words)]
    return []


def _drawn_by_default(pipeline: Path) -> int:
    """UNKNOWN_RESOLUTION, or what the transformer was made for where that is less."""
    return min(UNKNOWN_RESOLUTION, encoder_facts(pipeline).default_resolution)
