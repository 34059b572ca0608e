"""Lists of captioned images: folders, lists in JSONL and CSV, and tars, in a fixed order."""

from collections.abc import Iterator
from pathlib import Path

from soar_mega.data.caption_lists import list_rows
from soar_mega.data.image_folder import list_folder
from soar_mega.data.items import Item, Reject
from soar_mega.data.picture_kinds import IMAGE_SUFFIXES
from soar_mega.data.sample_tars import list_tar


def list_items(
    source: Path, images: Path | None = None, score_key: str = "score"
) -> tuple[list[Item], list[Reject]]:
    """Items of a source in a fixed order, and what is wrong with the others.

    Args:
        source: a folder of images with a NAME.txt or NAME.caption beside each NAME.png (.jpg, ...), or with a
            metadata.jsonl or metadata.csv (file_name, text), and the .tar files in it; a .jsonl or .csv file with
            file_name, text, or a .jsonl file with md5, caption_en, bw, bh (images named MD5.jpg); a .tar file as
            webdataset writes it.
        images: the folder of the images of a list; None: the folder that the list is in.
        score_key: where a list, or the .json of a sample in a tar, has the score of an image.

    Raises:
        ValueError: there is no such source, or it holds no image.
    """
    results: Iterator[Item | Reject]
    if source.is_dir():
        results = list_folder(source, score_key)
    elif source.is_file() and source.suffix in (".jsonl", ".csv"):
        results = list_rows(source, images or source.parent, score_key)
    elif source.is_file() and source.suffix == ".tar":
        results = list_tar(source, source.name, score_key)
    else:
        raise ValueError(f"{source} is neither an image folder nor a .jsonl file, a .csv file or a .tar file")
    found = list(results)
    if not found:
        kinds = " ".join(IMAGE_SUFFIXES)
        raise ValueError(
            f"{source} holds no images: images ({kinds}) with captions NAME.txt beside them are expected"
        )
    items = [item for item in found if isinstance(item, Item)]
    return items, [reject for reject in found if isinstance(reject, Reject)]
