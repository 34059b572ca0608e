"""How much of a text can be read in an image, once something has read it: the OCR score of Flow-GRPO."""


def share_read(wanted: str, read: str) -> float:
    """1 - min(d, n)/n, d the edit distance and n the length of what is wanted; 1 where that is part of what is read."""
    distance = 0 if wanted in read else edit_distance(wanted, read)
    return 1.0 - min(distance, len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: the fewest insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
