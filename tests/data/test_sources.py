"""Sources: every kind of list is read in a fixed order, and what is wrong is said by name."""

import errno
import json
import logging
import os
import pickle
import tarfile

import pytest
from data_fixtures import add_to_tar
from PIL import Image

from soar_mega.data.image_sources import list_items


def write_images(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


def write_lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_an_image_folder_with_captions(tmp_path):
    write_images(tmp_path, "b.png", "a.JPG", "sub/c.jpeg")
    for name, caption in [("b", "two\n"), ("a", "one"), ("sub/c", "dr\u00fcei")]:
        (tmp_path / f"{name}.txt").write_text(caption)
    items, rejects = list_items(tmp_path)
    assert [(item.name, item.captions[0].text) for item in items] == [
        ("a.JPG", "one"),
        ("b.png", "two"),
        ("sub/c.jpeg", "dr\u00fcei"),
    ]
    assert not rejects and all(item.bucket is None for item in items)


def test_what_is_wrong_in_a_folder_is_said_by_name(tmp_path):
    write_images(tmp_path, "good.png", "bare.png", "empty.png", "binary.png")
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "orphan.txt").write_text("nobody")
    items, rejects = list_items(tmp_path)
    assert [item.name for item in items] == ["good.png"]
    reasons = {reject.name: reject.reason for reject in rejects}
    assert "bare.txt is missing" in reasons["bare.png"]
    assert "empty.txt is empty" in reasons["empty.png"]
    assert "binary.txt is not UTF-8 (byte 0xff at place 0)" in reasons["binary.png"]
    assert "without an image" in reasons["orphan.txt"]
    assert len(rejects) == 4


def test_hugging_face_metadata(tmp_path, caplog):
    write_images(tmp_path, "x.png", "d/y.png", "d/z.png")
    (tmp_path / "x.txt").write_text("not this one")
    rows = [{"file_name": "x.png", "text": "an x"}, {"file_name": "d/y.png", "text": "a y"}]
    write_lines(tmp_path / "metadata.jsonl", *rows)
    items, rejects = list_items(tmp_path)
    assert [(item.name, item.captions[0].text) for item in items] == [
        ("x.png", "an x"),
        ("d/y.png", "a y"),
    ] and not rejects
    assert "does not list 1 pictures of its folder, such as" in caplog.text and "d/z.png" in caplog.text


def test_the_published_list(tmp_path):
    images = tmp_path / "images"
    write_images(images, "aa.jpg", "bb.jpg")
    rows = [{"md5": name, "caption_en": f"a {name}", "bw": 512, "bh": 768} for name in ("bb", "aa")]
    items, rejects = list_items(write_lines(tmp_path / "captions.jsonl", *rows), images)
    assert [(item.name, item.captions[0].text, item.bucket) for item in items] == [
        ("bb.jpg", "a bb", "512x768"),
        ("aa.jpg", "a aa", "512x768"),
    ]
    assert not rejects


def test_what_is_wrong_in_a_list_is_said_by_line(tmp_path):
    write_images(tmp_path, "aa.jpg")
    good = {"md5": "aa", "caption_en": "fine", "bw": 16, "bh": 16}
    lines = write_lines(
        tmp_path / "list.jsonl",
        good,
        {**good, "md5": "gone"},
        {**good, "caption_en": ""},
        {**good, "bw": "wide"},
        {"file_name": "aa.jpg"},
        {"text": "no image"},
        "{broken",
        "[1]",
        {**good, "bw": True},
        {**good, "caption_en": "half a \ud83e"},
        {"file_name": f"{'a' * 300}.jpg", "text": "no file can have this name"},
        {"file_name": "\x00.jpg", "text": "nor this one"},
        '{"file_name":' + "[" * 100_000,
    )
    items, rejects = list_items(lines)
    assert len(items) == 1
    words = [
        "gone.jpg is missing",
        "aa.jpg: has no caption (caption_en",
        "aa: bw is 'wide'",
        "aa.jpg: has no caption (text",
        "neither md5 nor file_name",
        "not valid JSON",
        "not a JSON object",
        "aa: bw is True",
        "aa.jpg: its caption is no text",
        "aaa... cannot be opened: File name too long",
        "is missing",
        "not valid JSON",
    ]
    for line, (reject, word) in enumerate(zip(rejects, words, strict=True), start=2):
        assert reject.name == f"list.jsonl:{line}" and word in reject.reason


def test_a_source_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        list_items(tmp_path)
    with pytest.raises(ValueError, match="neither an image folder nor a .jsonl file"):
        list_items(tmp_path / "nothing")


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    write_images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("an a", encoding="utf-8-sig")
    assert list_items(tmp_path)[0][0].captions[0].text == "an a"
    lines = write_lines(tmp_path / "list.jsonl", {"file_name": "a.png", "text": "an a"})
    lines.write_text(lines.read_text(), encoding="utf-8-sig")
    items, rejects = list_items(lines)
    assert [item.captions[0].text for item in items] == ["an a"] and not rejects


def test_latin_1_is_refused_in_a_list_as_in_a_caption(tmp_path):
    write_images(tmp_path, "a.png")
    lines = tmp_path / "list.jsonl"
    rows = [
        json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False) for text in ("a", "caf\u00e9")
    ]
    lines.write_bytes("\n".join(rows).encode("latin-1"))
    items, rejects = list_items(lines)
    assert [item.captions[0].text for item in items] == ["a"]
    assert [reject.name for reject in rejects] == ["list.jsonl:2"] and "not UTF-8" in rejects[0].reason


def test_pictures_behind_links_are_seen_and_loops_told(tmp_path, caplog):
    folder = tmp_path / "images"
    write_images(folder, "a.png")
    write_images(tmp_path / "elsewhere", "b.png")
    for caption in (folder / "a.txt", tmp_path / "elsewhere" / "b.txt"):
        caption.write_text("fine")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "around").symlink_to(".")
    (folder / "gone.png").symlink_to("nowhere.png")
    items, rejects = list_items(folder)
    assert [item.name for item in items] == ["a.png", "more/b.png"]
    assert [(reject.name, reject.reason) for reject in rejects] == [
        ("gone.png", "is a link to nowhere.png, which is missing")
    ]
    assert caplog.text.count("is a link to a folder around it") == 2


def test_pictures_of_other_kinds_are_told(tmp_path):
    write_images(tmp_path, "a.png", "b.gif")
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text("fine")
    items, rejects = list_items(tmp_path)
    assert len(items) == 1
    reasons = {reject.name: reject.reason for reject in rejects}
    assert set(reasons) == {"b.gif", "c.txt"} and "another kind" in reasons["b.gif"]


def test_what_other_programs_keep_beside_images_is_passed_over(tmp_path, caplog):
    for name in ("a", "._a", "@eaDir/a", ".ipynb_checkpoints/a-checkpoint", "__MACOSX/a"):
        write_images(tmp_path, f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("fine")
    with caplog.at_level(logging.INFO):
        items, rejects = list_items(tmp_path)
    assert [item.name for item in items] == ["a.png"] and not rejects
    assert "5 hidden files and folders are passed over" in caplog.text


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    write_images(tmp_path, "closed/a.png")
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    _, rejects = list_items(tmp_path)
    assert [reject.name for reject in rejects] == ["closed"] and "Permission denied" in rejects[0].reason


def test_captions_as_kohya_keeps_them(tmp_path, caplog):
    write_images(tmp_path, "a.png", "b.png")
    for name, caption in [
        ("a.caption", "an a"),
        ("b.caption", "tags"),
        ("b.txt", "a b"),
        ("c.caption", "nobody"),
    ]:
        (tmp_path / name).write_text(caption)
    items, rejects = list_items(tmp_path)
    assert [(item.name, item.captions[0].text) for item in items] == [("a.png", "an a"), ("b.png", "a b")]
    assert [reject.name for reject in rejects] == ["c.caption"]
    assert "1 images have a .txt and a .caption" in caplog.text


def test_a_list_in_a_folder_below_is_told(tmp_path, caplog):
    """As Hugging Face keeps splits: which of them are meant is for the user to say."""
    (tmp_path / "train").mkdir()
    write_images(tmp_path / "train", "a.png")
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "an a"}')
    assert not list_items(tmp_path)[0]
    assert (
        f"train/metadata.jsonl lists images and is not read: give its folder as a source, as {tmp_path}/train"
        in (caplog.text)
    )
    assert len(list_items(tmp_path / "train")[0]) == 1


def test_metadata_as_csv(tmp_path):
    write_images(tmp_path, "x.png", "d/y.png")
    lines = [
        "file_name,prompt,score",
        'x.png,"an x, seen ""twice""\nin two lines",6.5',
        "d/y.png,a y,none",
        "gone.png,a,1",
        "x.png,a\u2028b\x0cc\x85d,2",
        "x.png,an x, seen twice,3",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join([*lines, 'x.png,"never closed']))
    items, rejects = list_items(tmp_path)
    assert [(item.name, item.captions[0].text, item.score) for item in items] == [
        ("x.png", 'an x, seen "twice"\nin two lines', 6.5),
        ("d/y.png", "a y", None),
        ("x.png", "a\u2028b\x0cc\x85d", 2.0),
    ]
    assert [reject.name for reject in rejects] == [f"metadata.csv:{line}" for line in (5, 7, 8)]
    assert "gone.png is missing" in rejects[0].reason and "not valid CSV" in rejects[2].reason
    assert "more than 3 columns: a text with commas stands in double quotes" in rejects[1].reason


@pytest.mark.parametrize("first", ["file_name;text", "image,text", "x.png,a red fox"])
def test_a_csv_without_the_names_of_its_columns_is_refused_as_a_whole(tmp_path, first):
    """Spreadsheets write semicolons; each of a million lines would be listed as a fault of its own."""
    write_images(tmp_path, "x.png")
    (tmp_path / "list.csv").write_text(f"{first}\nx.png;a fox, seen twice\n")
    with pytest.raises(ValueError, match=f"list.csv: its first line, '{first}', names no column"):
        list_items(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text('file_name,"text\nx.png,a fox\n')
    with pytest.raises(ValueError, match="list.csv: its first line is not valid CSV"):
        list_items(tmp_path / "list.csv")


def test_a_list_names_nothing_outside_its_folder(tmp_path):
    folder = tmp_path / "set"
    write_images(tmp_path, "secret.png", "set/a.png")
    names = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        "d/../../secret.png",
        str(folder / "a.png"),
        "./a.png",
    ]
    write_lines(folder / "metadata.jsonl", *({"file_name": name, "text": "a"} for name in names))
    write_lines(folder / "more.jsonl", {"md5": "../secret", "caption_en": "a", "bw": 16, "bh": 16})
    items, rejects = list_items(folder)
    assert [item.image.path.name for item in items] == ["a.png", "a.png"]
    assert len(rejects) == 3 and all("--images names the folder" in reject.reason for reject in rejects)
    assert "is not in" in list_items(folder / "more.jsonl")[1][0].reason


class Trap:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_tars_of_webdataset_are_read_in_place(tmp_path, monkeypatch):
    """No pickle in them is loaded, and no name leads anywhere."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, "secret.png", "in.png")
    picture = (tmp_path / "in.png").read_bytes()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add_to_tar(tar, "b/1.txt", b"one\n")
        add_to_tar(tar, "b/1.png", picture)
        add_to_tar(tar, "b/1.json", json.dumps({"caption": "not this", "score": 5}).encode())
        add_to_tar(tar, "b/2.jpg", b"no picture")
        add_to_tar(tar, "b/2.json", json.dumps({"caption": "two"}).encode())
        add_to_tar(tar, "b/2.pkl", pickle.dumps(Trap()))
        add_to_tar(tar, "../../out.png", picture)
        add_to_tar(tar, "../../out.txt", b"stays inside")
        add_to_tar(tar, "3.png", b"", type=tarfile.SYMTYPE, linkname=str(tmp_path / "secret.png"))
        add_to_tar(tar, "3.txt", b"behind a link")
        add_to_tar(tar, "9.png", b"", type=tarfile.LNKTYPE, linkname="b/1.png")  # and so is its caption
        add_to_tar(tar, "9.txt", b"", type=tarfile.LNKTYPE, linkname="b/1.txt")
        add_to_tar(tar, "4.png", picture)
        add_to_tar(tar, "5.png", picture)
        add_to_tar(tar, "5.json", b"[1]")
        add_to_tar(tar, "6.png", picture)
        add_to_tar(tar, "6.pyd", pickle.dumps(Trap()))
        add_to_tar(tar, "b/1.mask.png", picture)
        add_to_tar(tar, "._b.png", b"of macOS")
        add_to_tar(tar, "7.v2.png", picture)
        add_to_tar(tar, "7.v2.txt", b"seven")
        for name in ("8.png", "8.jpg", "8.txt"):
            add_to_tar(tar, name, picture)
    before = sorted(tmp_path.rglob("*"))
    items, rejects = list_items(tmp_path / "0.tar")
    assert [(item.name, item.captions[0].text, item.score) for item in items] == [
        ("0.tar/b/1", "one", 5.0),
        ("0.tar/b/2", "two", None),
        ("0.tar/../../out", "stays inside", None),
    ]
    with items[0].image.open() as file:
        assert file.read() == picture
    reasons = {reject.name: reject.reason for reject in rejects}
    assert "caption without an image" in reasons["0.tar/3"] and "no caption" in reasons["0.tar/4"]
    assert "not a JSON object" in reasons["0.tar/5"] and len(reasons) == 8
    assert all("is a link" in reasons[name] for name in ("0.tar/3.png", "0.tar/9.png"))
    assert "dot in its name" in reasons["0.tar/7.v2.png"]
    assert reasons["0.tar/8"] == "has the pictures .png and .jpg: leave one of them"
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_and_compressed_tars_are_named(tmp_path):
    write_images(tmp_path, "in.png")
    for name, mode in (("whole.tar", "w"), ("packed.tar", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            for key in range(3):
                add_to_tar(tar, f"{key}.png", (tmp_path / "in.png").read_bytes())
                add_to_tar(tar, f"{key}.txt", b"fine")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:2600])
    for name, usable in (("packed.tar", 0), ("cut.tar", 1)):
        items, rejects = list_items(tmp_path / name)
        assert len(items) == usable
        assert "cannot be read as an uncompressed tar" in rejects[0].reason and rejects[0].name == name


def test_a_tar_that_is_over_before_its_end_is_named(tmp_path):
    """The library takes for the end: a damaged header, half of one, none at all, and where two tars were joined."""
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        for key in range(4):
            add_to_tar(tar, f"{key}.png", b"picture")
            add_to_tar(tar, f"{key}.txt", b"fine")
    whole, sample = (tmp_path / "whole.tar").read_bytes(), 4 * tarfile.BLOCKSIZE
    assert len(list_items(tmp_path / "whole.tar")[0]) == 4
    harmed = {
        "header": (2, whole[: 2 * sample + 10] + b"!" + whole[2 * sample + 11 :]),
        "half a header": (2, whole[: 2 * sample + 100]),
        "no header": (2, whole[: 2 * sample]),
        "zeros": (2, whole[: 2 * sample] + bytes(sample) + whole[3 * sample :]),
        "joined": (4, whole + whole),
    }
    for name, (usable, content) in harmed.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        items, [reject] = list_items(tmp_path / f"{name}.tar")
        assert len(items) == usable and (reject.name, reject.kind) == (f"{name}.tar", "damaged tar")
        assert f"byte {usable * sample}" in reject.reason and "copy it again" in reject.reason


def test_a_picture_that_is_in_a_tar_twice_is_named(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("1.png", "1.txt", "2.png", "2.txt", "2.PNG"):
            add_to_tar(tar, name, b"content")
    items, [reject] = list_items(tmp_path / "0.tar")
    assert [item.name for item in items] == ["0.tar/1"] and reject.name == "0.tar/2"
    assert reject.reason == "has the pictures .png and .png: leave one of them"
