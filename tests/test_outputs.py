"""Outputs: nothing of the user's is touched, and the next start goes on from any moment of a kill."""

import os
import sys
from pathlib import Path

import pytest

from soar_mega import outputs
from soar_mega.outputs import MARKER, OutputFolder, check_file, in_place_of, refuse_overlap, write_file

FILES = ("config.json", "deep/er/weights", "deep/link")
TOUCHING = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "ctypes.dlopen")


def write(folder: Path, text: str) -> None:
    """An output folder with `text` in all of its files."""
    output = OutputFolder(folder)
    output.begin()
    for name in FILES:
        (output.new / name).parent.mkdir(parents=True, exist_ok=True)
        (output.new / name).write_text(text)
    output.publish()


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MARKER
    }


def whole(text: str) -> dict[str, str]:
    return dict.fromkeys(FILES, text)


def killed_at(moment: int, folder: Path) -> bool:
    """Writes "new" in a process of its own that dies before it touches the disk the moment-th time; whether it died."""
    child = os.fork()
    if child == 0:
        left = [moment]

        def die(event: str, arguments: object) -> None:
            if event in TOUCHING:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(die)
        try:
            write(folder, "new")
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize(
    ("before", "exchange"), [("old", True), ("old", False), ("nothing", True), ("empty", True)]
)
def test_a_kill_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, before: str
) -> None:
    if not exchange:
        monkeypatch.setattr(outputs, "_exchange", lambda one, other: False)
    for moment in range(1000):
        place = tmp_path / str(moment)
        place.mkdir()
        folder = place / "out"
        if before == "old":
            write(folder, "old")
        elif before == "empty":
            folder.mkdir()
        died = killed_at(moment, folder)
        there = content(folder)
        possible = [whole("new")]
        possible += [whole("old")] if before == "old" else [{}]
        # two renames leave a moment without the folder, which the next start ends
        assert there in possible or (not exchange and not folder.exists())
        killed_at(moment // 3, folder)  # the next start too
        OutputFolder(folder).check()
        assert content(folder) in possible
        write(folder, "newer")
        assert content(folder) == whole("newer")
        assert os.listdir(place) == ["out"]
        if not died:
            assert there == whole("new") and moment > 15
            return
    raise AssertionError("it never ended")


def test_what_a_user_added_or_changed_stays(tmp_path: Path) -> None:
    for name, act in {
        "added": lambda f: (f / "deep/mine").write_text("mine"),
        "linked": lambda f: (f / "mine").symlink_to("nowhere"),
        "changed": lambda f: (f / "config.json").write_text("mine"),
        "same size": lambda f: (f / "config.json").write_text("OLD"),
        "marker lost": lambda f: (f / MARKER).unlink(),
        "marker of another": lambda f: (f / MARKER).write_text('{"files": 3}'),
    }.items():
        folder = tmp_path / name
        write(folder, "old")
        act(folder)
        before = sorted(folder.rglob("*")), content(folder)
        with pytest.raises(ValueError, match="holds what this program did not write"):
            write(folder, "new")
        assert (sorted(folder.rglob("*")), content(folder)) == before
    write(tmp_path / "lessened", "old")
    (tmp_path / "lessened/config.json").unlink()
    write(tmp_path / "lessened", "new")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file"):
        write(tmp_path / "file", "new")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_appears_meanwhile_stays(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    output.begin()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(ValueError, match="did not write, .*: mine"):
        output.publish()
    output.give_up()
    assert content(tmp_path) == {"out/mine": "mine"}


@pytest.mark.parametrize("name", [".out.soar_mega-new", ".out.soar_mega-old"])
def test_a_name_of_ours_with_something_foreign_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is in the way"):
        write(tmp_path / "out", "new")
    assert content(tmp_path) == {f"{name}/mine": "mine"}


def test_two_do_not_write_one_folder(tmp_path: Path) -> None:
    first = OutputFolder(tmp_path / "out")
    first.begin()
    with pytest.raises(ValueError, match="another process is writing"):
        OutputFolder(tmp_path / "out").begin()
    first.publish()
    write(tmp_path / "out", "new")


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    for text in ("old", "new"):
        write(tmp_path / "out", text)
    assert (tmp_path / "out").is_symlink() and content(tmp_path / "disk/out") == whole("new")


def test_overlap(tmp_path: Path) -> None:
    (tmp_path / "input/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("input/inner")
    inputs = {"the source": tmp_path / "input/inner", "nothing": ""}
    for path, how in {
        "input": "contains",
        "input/inner": "is",
        "link": "is",
        "link/../inner/new": "lies in",
        "link/new": "lies in",
        ".": "contains",
    }.items():
        with pytest.raises(ValueError, match=f"{how} the source .*which is read"):
            refuse_overlap(tmp_path / path, inputs)
    refuse_overlap(tmp_path / "input/inner2", inputs)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "new/file.json"
    for number in (1, 2):
        with in_place_of(file, b"ours") as new:
            new.write_bytes(b"ours")
        # as a killed process of the same number leaves it, such as a container's first
        new.write_bytes(b"half")
        write_file(file, b"ours %d" % number, b"ours")
    assert file.read_bytes() == b"ours 2" and os.listdir(file.parent) == ["file.json"]
    file.write_bytes(b"mine")
    with pytest.raises(ValueError, match="was not written by this program"):
        check_file(file, b"ours")
    assert file.read_bytes() == b"mine"
    file.write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for other in (file, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="was not written by this program"):
            check_file(other, b"ours")
    with pytest.raises(ValueError, match="is a folder"):
        check_file(tmp_path, b"ours")
    with pytest.raises(OSError, match="File exists"):
        check_file(file / "below", b"ours")
