"""prepare: from captioned images to shards, interrupted or not, and what it refuses."""

import errno
import fcntl
import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from damaged_pictures import damaged_pictures
from PIL import Image

from soar_mega.data import images as images_module
from soar_mega.data import prepare as prepare_module
from soar_mega.data.images import to_model_range
from soar_mega.data.loaded_encoders import Encoders
from soar_mega.data.prepare import prepare
from soar_mega.data.prepare_options import Options
from soar_mega.data.selection import Wishes
from soar_mega.data.shards import open_shards

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
COUNT = 7


@pytest.fixture
def images(tmp_path):
    """Seven captioned images of 16 x 16, the fourth one wide."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        size = (16, 16) if index != 3 else (12, 20)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a red {index}")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_samples_are_what_the_encoders_make_of_the_images(images, tmp_path):
    result = prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=3, batch_size=2))
    assert result.samples == COUNT and result.buckets == {"16x16": 6, "20x12": 1} and not result.rejects
    shards = open_shards(tmp_path / "out")
    encoders = Encoders.from_pipeline(BASE)
    assert shards.names(range(COUNT)) == [f"{i}.png (shard-{i // 3:06d}.tar, {i:09d})" for i in range(COUNT)]
    for index in range(COUNT):
        image = np.array(Image.open(images / f"{index}.png"))
        mean, std = encoders.encode_images(to_model_range(torch.from_numpy(image).permute(2, 0, 1)[None]))
        text, pooled = encoders.encode_prompts([f"a red {index}"])
        stored = shards.stored("latents", index)
        torch.testing.assert_close(stored["mean"], mean[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(stored["std"], std[0], rtol=0, atol=1e-5)
        batch = shards.batch([index], seed=0)
        torch.testing.assert_close(batch.text, text, rtol=0, atol=1e-5)
        torch.testing.assert_close(batch.pooled, pooled, rtol=0, atol=1e-5)
    empty_text, empty_pooled = encoders.encode_prompts([""])
    assert torch.equal(batch.empty_text, empty_text[0]) and torch.equal(batch.empty_pooled, empty_pooled[0])


def test_the_same_input_gives_the_same_bytes_interrupted_or_not(images, tmp_path, monkeypatch):
    prepare(images, tmp_path / "whole", BASE, Options(samples_per_shard=2))
    calls = []
    real = Encoders.encode_images

    def failing(self, batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Encoders, "encode_images", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(images, tmp_path / "cut", BASE, Options(samples_per_shard=2))
    with pytest.raises(ValueError, match="unfinished"):
        open_shards(tmp_path / "cut")
    prepare(images, tmp_path / "cut", BASE, Options(samples_per_shard=2))
    # Shard 0 was complete, the second one was cut between its two buckets.
    assert sum(calls[3:]) == COUNT - 2
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_a_finished_folder_is_left_alone(images, tmp_path, monkeypatch):
    first = prepare(images, tmp_path / "out", BASE)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(Encoders, "from_pipeline", None)
    assert prepare(images, tmp_path / "out", BASE) == first
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match="begun with flip False, not True"):
        prepare(images, tmp_path / "out", BASE, Options(wishes=Wishes(flip=True)))
    (images / "3.txt").write_text("another caption")
    with pytest.raises(ValueError, match="other images or captions"):
        prepare(images, tmp_path / "out", BASE)


def test_an_unfinished_folder_with_other_settings_is_refused(images, tmp_path):
    (images / "0.png").write_text("broken")
    with pytest.raises(ValueError, match="1 of 7"):
        prepare(images, tmp_path / "out", BASE)
    with pytest.raises(ValueError, match="begun with samples_per_shard 1000, not 4"):
        prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=4))


def test_invalid_samples_fail_the_preparation_by_name_unless_skipped(images, tmp_path, caplog):
    whole = (images / "2.png").read_bytes()
    (images / "2.png").write_bytes(whole[:100])
    (images / "4.txt").unlink()
    out = tmp_path / "out"
    with (
        caplog.at_level(logging.INFO, logger="soar_mega"),
        pytest.raises(ValueError) as error,
    ):
        prepare(images, out, BASE, Options(samples_per_shard=2))
    assert "         1  no caption\n" in caplog.text
    message = str(error.value)
    assert "2 of 7 samples cannot be used" in message and "--skip-invalid" in message
    assert (
        "4.png: has no caption: 4.txt is missing" in message
        and "2.png: cannot be read as an image" in message
    )
    listed = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {(row["name"], row["kind"]) for row in listed} == {
        ("2.png", "picture cannot be read"),
        ("4.png", "no caption"),
    }
    assert not list(out.glob("shard-*"))  # what is wrong at first sight is said before anything is encoded

    result = prepare(images, out, BASE, Options(samples_per_shard=2, skip_invalid=True))
    assert result.samples == 5 and {reject.name for reject in result.rejects} == {"2.png", "4.png"}
    names = [name.split()[0] for name in open_shards(out).names(range(5))]
    assert names == ["0.png", "1.png", "3.png", "5.png", "6.png"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_picture_costs_nothing_but_itself(images, tmp_path, monkeypatch):
    """Neither its shard, nor what was encoded when the samples that cannot be used are left out later."""
    damaged = damaged_pictures()
    for kind, content in damaged.items():
        (images / f"{kind}.jpg").write_bytes(content)
        (images / f"{kind}.txt").write_text("a red 1")
    with pytest.raises(ValueError, match="4 of 11 samples cannot be used"):
        prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=2))
    monkeypatch.setattr(Encoders, "from_pipeline", None)
    result = prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=2, skip_invalid=True))
    assert result.samples == COUNT and {reject.name for reject in result.rejects} == {
        f"{k}.jpg" for k in damaged
    }


def test_repaired_samples_are_taken_by_the_next_call(images, tmp_path):
    whole = (images / "2.png").read_bytes()
    (images / "2.png").write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match="1 of 7"):
        prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=2))
    (images / "2.png").write_bytes(whole)
    (images / "5.txt").write_text("a green 5")  # in a shard that had no rejects
    prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=2))
    prepare(images, tmp_path / "fresh", BASE, Options(samples_per_shard=2))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_picture_that_a_disk_did_not_give_is_read_by_the_next_call(images, tmp_path, monkeypatch):
    def no_disk(path, *args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(images_module, "open", no_disk, raising=False)
    with pytest.raises(ValueError, match="7 of 7 samples cannot be used"):
        prepare(images, tmp_path / "out", BASE)
    monkeypatch.undo()
    assert prepare(images, tmp_path / "out", BASE).samples == COUNT


def test_an_image_that_was_replaced_by_one_of_the_same_size_is_encoded_anew(images, tmp_path):
    """A copy of the source, which has other times, is the same source."""
    for path in images.glob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    (images / "6.bmp").rename(images / "6.gif")
    with pytest.raises(ValueError, match="1 of 7"):
        prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=2))
    Image.new("RGB", (16, 16), "red").save(images / "0.bmp")
    (images / "6.gif").rename(images / "6.bmp")
    prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=2))
    shutil.copytree(images, tmp_path / "copy")
    prepare(tmp_path / "copy", tmp_path / "fresh", BASE, Options(samples_per_shard=2))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    shutil.copy(images / "0.bmp", images / "1.bmp")
    with pytest.raises(ValueError, match="other images or captions"):
        prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=2))
    prepare(tmp_path / "copy", tmp_path / "out", BASE, Options(samples_per_shard=2))


def test_shards_of_a_larger_source_go(images, tmp_path):
    (images / "0.png").rename(images / "0.gif")
    with pytest.raises(ValueError, match="1 of 7"):
        prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=2))
    for index in (0, 4, 5, 6):
        (images / f"{index}.txt").unlink()
        next(images.glob(f"{index}.*")).unlink()
    prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=2))
    prepare(images, tmp_path / "fresh", BASE, Options(samples_per_shard=2))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_captions_that_an_encoder_cuts_are_counted(images, tmp_path, caplog):
    for index in (2, 5):
        (images / f"{index}.txt").write_text("a red 3 left of a green 7 above a blue 2 left of a white 1")
    prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=3))
    cut = json.loads((tmp_path / "out" / "dataset.json").read_text())["captions_cut"]
    assert cut == {"text_encoder": 2, "text_encoder_2": 2, "text_encoder_3": 2}
    assert "2 of 7 captions are longer than text_encoder_3 takes and were cut" in caplog.text


def test_latents_that_are_not_finite_are_rejected_by_name(images, tmp_path, monkeypatch):
    real = Encoders.encode_images

    def broken(self, batch):
        mean, std = real(self, batch)
        mean[-1, 0, 0, 0] = float("nan")
        return mean, std

    monkeypatch.setattr(Encoders, "encode_images", broken)
    with pytest.raises(ValueError, match=r"2 of 7 .*\n +6\.png: its latents hold NaN.*\n +3\.png"):
        prepare(images, tmp_path / "out", BASE)


def test_the_published_list_brings_its_own_buckets(images, tmp_path):
    jpegs = tmp_path / "jpegs"
    jpegs.mkdir()
    rows = []
    for index, (width, height) in enumerate([(16, 16), (20, 12), (30, 16)]):
        Image.open(images / f"{index}.png").save(jpegs / f"{index}.jpg")
        rows.append({"md5": str(index), "caption_en": "a 1", "bw": width, "bh": height})
    source = tmp_path / "list.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"2\.jpg: bucket 30x16: width and height must be multiples of 4"):
        prepare(source, tmp_path / "out", BASE, Options(images=jpegs))
    assert prepare(source, tmp_path / "out", BASE, Options(images=jpegs, skip_invalid=True)).buckets == {
        "16x16": 1,
        "20x12": 1,
    }


def test_flips_are_further_samples(images, tmp_path):
    assert prepare(images, tmp_path / "out", BASE, Options(wishes=Wishes(flip=True))).samples == 2 * COUNT
    shards = open_shards(tmp_path / "out")
    assert [name.split(" (shard")[0] for name in shards.names([4, 5])] == ["2.png", "2.png (mirrored)"]
    plain, mirrored = (shards.stored("latents", index)["mean"] for index in (4, 5))
    image = torch.from_numpy(np.array(Image.open(images / "2.png"))).permute(2, 0, 1).flip(2)
    expected, _ = Encoders.from_pipeline(BASE).encode_images(to_model_range(image[None]))
    torch.testing.assert_close(mirrored, expected[0], rtol=0, atol=1e-5)
    assert not torch.allclose(plain, mirrored)


def test_buckets_can_be_given(images, tmp_path):
    assert prepare(images, tmp_path / "out", BASE, Options(buckets=["12x12"])).buckets == {"12x12": COUNT}
    assert open_shards(tmp_path / "out").info.latent_shape("12x12") == (4, 6, 6)
    with pytest.raises(ValueError, match="multiples of 4 pixels"):
        prepare(images, tmp_path / "other", BASE, Options(buckets=["13x12"]))


def test_buckets_are_chosen_from_the_images(images, tmp_path, caplog):
    wanted = Options(buckets=["12x20", "20x12", "16x16", "32x16"], bucket_count=2)
    with caplog.at_level(logging.INFO, logger="soar_mega"):
        result = prepare(images, tmp_path / "two", BASE, wanted)
    assert result.buckets == {"16x16": 6, "20x12": 1}
    assert "2 of 4 buckets are used: 20x12, 16x16" in caplog.text
    result = prepare(images, tmp_path / "one", BASE, Options(min_bucket=2))
    assert result.buckets == {"16x16": 7}
    with pytest.raises(ValueError, match="begun with min_bucket 2, not 0"):
        prepare(images, tmp_path / "one", BASE)
    with pytest.raises(ValueError, match="bucket_count is 0"):
        prepare(images, tmp_path / "other", BASE, Options(bucket_count=0))


def test_several_captions_are_one_sample(images, tmp_path, caplog):
    """With one image's latents, and each of the texts as it is where it stands alone."""
    texts = ["a red 0", "a blue 1", "a white 2", "a caption that is longer than ten tokens " * 3]
    row = {"file_name": "0.png", "text": texts, "weights": [1, 1, 2, 4]}
    (images / "metadata.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"text": "a red 0"}) + "\n"
    )
    assert prepare(images, tmp_path / "out", BASE, Options(batch_size=3)).samples == 2
    opened, encoders = open_shards(tmp_path / "out"), Encoders.from_pipeline(BASE)
    assert opened.captions(0) == [text.strip() for text in texts] and opened.captions(1) == ["a red 0"]
    for number, text in enumerate(texts):
        expected, _ = encoders.encode_prompts([text])
        found = opened.stored("text", 0, number)["text"]
        torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-5)
    assert "1 of 5 captions are longer than" in caplog.text


def test_two_preparations_do_not_share_a_folder(images, tmp_path, monkeypatch, caplog):
    def second(*args):
        prepare(images, tmp_path / "out", BASE)

    real = fcntl.flock

    def over_a_network(file, kind):  # where a lock is one of a range of bytes: who shares it reads the file
        if kind & fcntl.LOCK_SH and not file.readable():
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(file, kind)

    monkeypatch.setattr(fcntl, "flock", over_a_network)
    monkeypatch.setattr(prepare_module._Preparation, "_encode", second)
    with pytest.raises(ValueError, match="another `soar-mega prepare` is writing"):
        prepare(images, tmp_path / "out", BASE)
    assert "cannot be locked" not in caplog.text


def test_nothing_usable_is_an_error(images, tmp_path):
    for path in images.glob("*.png"):
        path.write_text("broken")
    with pytest.raises(ValueError, match="none of the 7 samples"):
        prepare(images, tmp_path / "out", BASE, Options(skip_invalid=True))


def test_a_folder_without_encoders_is_refused(images, tmp_path):
    shutil.copytree(BASE, tmp_path / "p", ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(ValueError, match="vae/config.json"):
        prepare(images, tmp_path / "out", tmp_path / "p")


def test_no_progress_bar_where_nobody_looks(images, tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="soar_mega"):
        prepare(images, tmp_path / "out", BASE)
    assert capsys.readouterr().err == ""
    assert "7 samples in 1 shards" in caplog.text


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("images", "is the source"),
        ("images/shards", "lies in the source"),
        (".", "contains the source"),
        ("pipeline/shards", "lies in the pipeline"),
        ("mine", "mine holds rejects.jsonl but no prepare.json"),
    ],
)
def test_nothing_of_the_users_is_written_over(images, tmp_path, out, words):
    (tmp_path / "pipeline").symlink_to(BASE)
    (tmp_path / "mine").mkdir()
    for name in ("rejects.jsonl", ".lock"):
        (tmp_path / "mine" / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=words):
        prepare(images, tmp_path / out, tmp_path / "pipeline")
    assert sorted(tmp_path.rglob("*")) == before and not (BASE / "shards").exists()
    assert contents(tmp_path / "mine") == {"rejects.jsonl": b"mine", ".lock": b"mine"}


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"format_version": 1, "samples": [1], "bytes": 3}'])
def test_a_damaged_index_costs_one_shard(images, tmp_path, content):
    prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=4))
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "dataset.json").unlink()
    (tmp_path / "out" / "shard-000000.json").write_text(content)
    prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=4))
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset.json", "[]"),
        ("dataset.json", '{"name": "a data set of somebody else"}'),
        ("dataset.json", '{"format_version": 1, "shards": []}'),
        ("prepare.json", "[]"),
        ("prepare.json", "\xff"),
    ],
)
def test_a_foreign_file_is_named(images, tmp_path, name, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=name):
        prepare(images, tmp_path / "out", BASE)


def test_out_of_memory_it_goes_on_with_a_smaller_batch(images, tmp_path, monkeypatch):
    """Complete shards are kept; latents of the others differ by the rounding of another batch size at most."""
    real = Encoders.encode_images
    sizes = []

    def small_memory(self, batch):
        sizes.append(len(batch))
        if len(batch) > 1 and len(sizes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    prepare(images, tmp_path / "whole", BASE, Options(samples_per_shard=3))
    monkeypatch.setattr(Encoders, "encode_images", small_memory)
    with pytest.raises(
        ValueError, match="out of memory with --batch-size 8: the same command with a smaller"
    ):
        prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=3))
    prepare(images, tmp_path / "out", BASE, Options(samples_per_shard=3, batch_size=1))
    assert sizes == [3, 2, 1, 1, 1, 1]
    whole, out = (open_shards(tmp_path / name) for name in ("whole", "out"))
    assert whole.names(range(COUNT)) == out.names(range(COUNT))
    for index in range(COUNT):
        expected, found = whole.stored("latents", index), out.stored("latents", index)
        torch.testing.assert_close(found["mean"], expected["mean"], rtol=0, atol=1e-5)


def test_filters_duplicates_and_the_held_out_set(images, tmp_path, caplog):
    shutil.copy(images / "1.png", images / "7.png")
    (images / "7.txt").write_text("the first one again")
    Image.new("RGB", (8, 8)).save(images / "small.png")
    (images / "small.txt").write_text("small")
    wishes = Wishes(min_side=10, aspect=1.5, drop_duplicates=True, held_out_share=0.5, flip=True)
    result = prepare(images, tmp_path / "out", BASE, Options(wishes=wishes))
    assert {(reject.name, reject.kind) for reject in result.rejects} == {
        ("3.png", "too long"),
        ("7.png", "duplicate"),
        ("small.png", "too small"),
    }
    row = json.loads((tmp_path / "out" / "duplicates.jsonl").read_text())
    assert row == {"name": "7.png", "same_as": "1.png"} and "1 samples have the same image" in caplog.text
    held_out = open_shards(tmp_path / "out" / "held_out")
    names = {name.split(" (shard")[0] for name in held_out.names(range(len(held_out)))}
    # of each image its content decides alone, and none is mirrored
    assert names == {
        name for name in ("0.png", "1.png", "2.png", "4.png", "5.png", "6.png") if is_low(images / name)
    }
    assert result.samples == 2 * (6 - len(names)) and 0 < len(names) < 6
    assert torch.equal(held_out.empty_prompt()[0], open_shards(tmp_path / "out").empty_prompt()[0])
    changed = (images / min(names)).with_suffix(".txt")
    changed.write_text("another caption")
    with pytest.raises(ValueError, match="held_out was made of other images or captions"):
        prepare(images, tmp_path / "out", BASE, Options(wishes=wishes))
    with pytest.raises(ValueError, match="holds none: give a larger one"):
        prepare(images, tmp_path / "other", BASE, Options(wishes=Wishes(held_out_share=1e-9)))


def is_low(path):
    return hashlib.sha256(path.read_bytes()).digest()[0] < 128


def test_scores_of_a_list(images, tmp_path, caplog):
    rows = [{"file_name": f"{i}.png", "caption": f"a {i}", "aesthetic": i} for i in range(6)]
    (images / "metadata.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, {"file_name": "6.png", "text": "a"}]))
    )
    wishes = Wishes(min_score=4.5)
    with pytest.raises(ValueError, match=r"1 of 7 .*\n +6\.png: the source gives it no score"):
        prepare(images, tmp_path / "out", BASE, Options(wishes=wishes, score_key="aesthetic"))
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="soar_mega"):
        result = prepare(
            images, tmp_path / "out", BASE, Options(wishes=wishes, score_key="aesthetic", skip_invalid=True)
        )
    assert result.samples == 1 and "         5  score too low\n" in caplog.text
    assert caplog.text.count("         1  no score\n") == 1, "told once, not at the end again"


@pytest.mark.parametrize(
    ("wishes", "words"),
    [({"min_side": 0}, "min_side"), ({"aspect": 0.5}, "aspect"), ({"held_out_share": 1.0}, "held_out_share")],
)
def test_wishes_that_no_image_fulfils(images, tmp_path, wishes, words):
    with pytest.raises(ValueError, match=words):
        prepare(images, tmp_path / "out", BASE, Options(wishes=Wishes(**wishes)))
