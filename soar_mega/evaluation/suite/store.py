"""The folder of an evaluation: every image and every score is in it as soon as it is made.

    evaluation.json                              what is evaluated; it marks the folder as this program's
    images/<model>-<point>-<hash>/<set>/*.png    one file per image; the hash is of all that an image depends on
    scores/<model>-<point>-<hash>/<set>.<scorer>-<hash>.jsonl    one line per image, written when all are there;
        before that each process has a file of its own, *.part-<rank>
    facts/<model>.json                           where it is, and what its images depend on
    drift/<model>-<hash>.json  distances/<model>-<point>-<hash>/<set>-<hash>.json
    distances/real-<hash>-*.pt                   what the network of FID says of a set's real images
    tiny_weights/                                of the scorers, where the suite asks for such
    report.html report.json table.csv outcomes.csv

An image or a score of other weights or settings has another hash, so nothing is ever mixed. Files are replaced as a
whole: whoever goes on after a kill finds each of them complete or not at all.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from soar_mega.evaluation.pictures import from_pil, to_pil
from soar_mega.evaluation.scorers.broken import what_is_broken
from soar_mega.outputs import check_file, remove_left_over_files, write_file

MARK = b"soar-mega evaluate"
ABOUT = "evaluation.json"
TINY_WEIGHTS = "tiny_weights"
OWN_NAMES = (
    TINY_WEIGHTS,
    "images",
    "scores",
    "drift",
    "facts",
    "distances",
    "report.json",
    "report.html",
    "table.csv",
    "outcomes.csv",
)
DEFECT = "Defect"  # of a PNG's texts: what was wrong with the image before it was rounded
DEFECTS = ("NaN", "black")

Json = dict[str, Any]
Values = dict[str, float]


class Store:
    """The folder.

    Args:
        path: it is made. What is in it under names of ours must be an evaluation of this program.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check(self) -> None:
        """Makes the folder where there is none.

        Raises:
            ValueError: it holds something else.
            OSError: it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: give the name of a folder")
        foreign = [name for name in OWN_NAMES if (self.path / name).exists()]
        if foreign and not (self.path / ABOUT).is_file():
            raise ValueError(
                f"{self.path} holds {foreign[0]}, which this program did not write: give the evaluation a folder of "
                "its own"
            )
        check_file(self.path / ABOUT, MARK)
        if not (self.path / ABOUT).exists():
            self.write_json(ABOUT, {})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this evaluation. ValueError: another one is writing it."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems have no locks on folders
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(f"{self.path}: another evaluation is writing this folder") from None
            yield
        finally:
            os.close(folder)

    def names(self, pattern: str) -> list[str]:
        """Files of the folder, in order."""
        return [path.relative_to(self.path).as_posix() for path in sorted(self.path.glob(pattern))]

    def folder_of(self, images: str, name: str) -> str:
        """The folder of images with this hash: the one that there is, whatever the model was called, or a new one."""
        known = sorted((self.path / "images").glob(f"*-{images}"))
        return known[0].name if known else f"{name}-{images}"

    def write_json(self, name: str, content: Json) -> None:
        """Replaces a JSON file of the folder."""
        self.write(name, json.dumps({"written_by": MARK.decode()} | content, indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        """Replaces a file of the folder; the text holds the mark."""
        write_file(self.path / name, text.encode(), MARK)

    def read_json(self, name: str) -> Json | None:
        """A JSON file of the folder, None where there is none."""
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else None


def digest(said: Mapping[str, Any]) -> str:
    """Ten characters of the SHA-256 of what is said."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:10]


class Images:
    """The images of one set as one model drew them at one point.

    Args:
        folder: made with the first image.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> set[str]:
        """Of those that are there."""
        if not self.folder.is_dir():
            return set()
        return {path.stem for path in self.folder.glob("*.png")}

    def clean(self) -> None:
        """Removes what a killed process left half written. Before any process draws."""
        remove_left_over_files(self.folder)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.png"

    def write(self, name: str, image: Tensor) -> None:
        """Writes an image [3, H, W] in [0, 1], rounded to 8 bits; one that is no picture says so in its file."""
        info = PngInfo()
        info.add_text("Software", MARK.decode())
        info.add_text(DEFECT, what_is_broken(image[None])[0])
        content = BytesIO()
        to_pil(image.nan_to_num(0.0, 0.0, 0.0)).save(content, "PNG", pnginfo=info)
        write_file(self.path(name), content.getvalue(), MARK)

    def read(self, name: str) -> Tensor:
        """[3, H, W] float32 in [0, 1]."""
        with Image.open(self.path(name)) as picture:
            return from_pil(picture.convert("RGB"))

    def defect(self, name: str) -> str:
        """What is wrong with an image: one of DEFECTS, or nothing."""
        with Image.open(self.path(name)) as picture:
            return str(picture.info[DEFECT])


class ScoreFile:
    """The values that one scorer gave to the images of one set.

    Args:
        folder: of the images' scores.
        header: what the values depend on.
        rank: of this process among those that score.
    """

    def __init__(self, folder: Path, prompt_set: str, header: Json, rank: int) -> None:
        scorer = re.sub(r"[^\w-]", "_", header["scorer"])
        path = folder / f"{prompt_set}.{scorer}-{digest(header)}.jsonl"
        self._path = path
        self._header = json.dumps({"written_by": MARK.decode()} | header, sort_keys=True) + "\n"
        self._part = path.with_name(f"{path.name}.part-{rank}")

    def values(self) -> dict[str, Values]:
        """By image: all that is there so far, of whichever process.

        Raises:
            ValueError: a file was not written by this program.
        """
        found: dict[str, Values] = {}
        for path in [*sorted(self._parts()), self._path]:
            if path.is_file():
                found |= self._read(path)
        return found

    def _parts(self) -> list[Path]:
        folder = self._path.parent
        return list(folder.glob(f"{self._path.name}.part-*")) if folder.is_dir() else []

    def _read(self, path: Path) -> dict[str, Values]:
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and lines[0].endswith(b"\n") and lines[0] != self._header.encode():
            raise ValueError(f"{path} was not written by this program, or was changed: move it away")
        # the last line of a process that was killed may be half of one
        whole = [json.loads(line) for line in lines[1:] if line.endswith(b"\n")]
        return {each["image"]: each["values"] for each in whole}

    def add(self, values: Mapping[str, Values]) -> None:
        """Appends values by image to the file of this process."""
        self._part.parent.mkdir(parents=True, exist_ok=True)
        with open(self._part, "ab+") as file:
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
            lines = [] if b"\n" in content else [self._header]
            lines += [_line(name, value) for name, value in values.items()]
            file.write("".join(lines).encode())

    def finish(self, names: list[str]) -> None:
        """Puts all values in one file, in the order of names, and removes the parts. By one process."""
        found = self.values()
        text = self._header + "".join(_line(name, found[name]) for name in names)
        if not self._path.is_file() or self._path.read_text() != text:
            write_file(self._path, text.encode(), MARK)
        for part in self._parts():
            part.unlink()


def _line(name: str, values: Values) -> str:
    return json.dumps({"image": name, "values": values}) + "\n"
