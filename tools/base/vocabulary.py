"""The tokenizers of the tiny pipeline: CLIP's and T5's real classes with a few words."""

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, T5Tokenizer

from soar_mega.examples.digits.canvases import COLOURS, COUNTS

# "a red 3 left of a green 7" with its begin and end tokens; T5 has one token less.
TEXT_LENGTH = 10
WORDS = (
    "a",
    "an",
    "and",
    "left",
    "right",
    "of",
    "above",
    "below",
    "the",
    "number",
    *COLOURS,
    *COUNTS.values(),
)


def clip_tokenizer() -> CLIPTokenizer:
    """Every byte is in the vocabulary, as in CLIP's own, so any prompt has tokens; each of WORDS is one token."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = _apply(merges, word)
        while len(parts) > 1:
            # A new merge comes last, so that the words before keep their tokens.
            pair = (parts[0], parts[1])
            merges.append(pair)
            tokens.append("".join(pair))
            parts = _apply(merges, word)
    # transformers reads an end-of-text id of 2 as a legacy configuration: keep it last.
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def _apply(merges: list[tuple[str, str]], word: str) -> list[str]:
    parts = [*word[:-1], word[-1] + "</w>"]
    for pair in merges:
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == pair:
                parts[i : i + 2] = ["".join(pair)]
            else:
                i += 1
    return parts


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: whole words and digits score best, single letters are the fallback for other words."""
    digits = [str(d) for d in range(10)]
    pieces = [f"\u2581{piece}" for piece in (*WORDS, *digits, '"')] + digits + ['"', "s"]
    letters = ["\u2581", *(chr(c) for c in range(ord("a"), ord("z") + 1) if chr(c) != "s")]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(piece, -1.0) for piece in pieces] + [(letter, -10.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_LENGTH)
