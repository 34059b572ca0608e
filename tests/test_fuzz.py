"""Files damaged at random: every reader takes them or says what is wrong with an error of ours, and nothing else."""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from soar_mega.convert import pipeline_parts, scheduler_shift
from soar_mega.convert.safetensors_reader import Reader
from soar_mega.convert.weight_files import INDEX, SINGLE
from soar_mega.data.encoder_facts import encoder_facts
from soar_mega.data.fingerprints import fingerprints
from soar_mega.data.image_sources import list_items
from soar_mega.data.images import ImageError, image_size, read_image
from soar_mega.data.info import bucket_size
from soar_mega.data.loaded_encoders import Encoders
from soar_mega.data.prepare import prepare
from soar_mega.data.prepare_options import Options
from soar_mega.data.shards import open_shards
from soar_mega.launch.chain import load_chain
from soar_mega.models.family import read_sizes
from soar_mega.stages import load_recipe

sys.path.append(str(Path(__file__).parent / "checkpoints"))
from test_foreign_files import COMPLETE, DESCRIPTION, LINEAGE, READERS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BASE = ROOT / "recipes/tiny/base"
# put into a text somewhere: what JSON and YAML give a meaning, and values that fit nowhere
TOKENS = (
    *'[]{},:"\\-&*?!|#~\n\t\0',
    *("null", "true", "-3", "1e30", "NaN", '"\\ud800"', "0x", "2024-13-45", "<<: ", "!!int ", "&a ", "*a"),
    *("9" * 400, "9" * 5000, "[" * 3000, "a" * 300, "\u00b2", "\ufeff"),
)
VALUES = (
    None,
    True,
    -3,
    0,
    1e30,
    10**30,
    float("nan"),
    "",
    "\x00",
    "a" * 300,
    "../x",
    [],
    [None],
    {},
    {"a": []},
)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Different damage in every test, the same in every run."""
    return random.Random(request.node.name)


def damaged_bytes(content: bytes, rng: random.Random, among: int | None = None) -> bytes:
    """Some bytes changed, among the first `among`; now and then the end is missing."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(min(among or len(content), len(content)))] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.1 else changed)


def damaged_text(text: str, rng: random.Random) -> str:
    """Something put in, and a little taken away."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(TOKENS) + text[at + rng.randrange(4) :]
    return text


def damaged_json(text: str, rng: random.Random) -> str:
    """Valid JSON with another value in one place, or a text that need not be JSON at all."""
    if rng.random() < 0.4:
        return damaged_text(text, rng)
    content = json.loads(text)
    at, key = rng.choice([({"": content}, ""), *places(content)])
    if not key:
        return json.dumps(rng.choice(VALUES))
    if rng.random() < 0.2:
        del at[key]
    else:
        at[key] = rng.choice(VALUES)
    return json.dumps(content)


def places(content: object) -> Iterator[tuple[dict, object]]:
    """(container, key) of every value of a JSON document."""
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield content, key
        yield from places(value)


def pictures() -> Iterator[tuple[str, bytes]]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a text", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    image = Image.effect_noise((24, 16), 90)
    for kind, mode, options in (
        ("JPEG", "RGB", {"exif": exif}),
        ("PNG", "RGBA", {"exif": exif}),
        ("PNG", "P", {}),
        ("WEBP", "RGB", {"exif": exif}),
        ("AVIF", "RGB", {"exif": exif}),
        ("BMP", "RGB", {}),
        ("GIF", "P", {}),
        ("TIFF", "RGB", {"exif": exif}),
    ):
        file = io.BytesIO()
        image.convert(mode).save(file, kind, **options)
        yield f"{kind} {mode}", file.getvalue()


@pytest.mark.parametrize("kind", [kind for kind, _ in pictures()])
def test_pictures(kind: str, tmp_path: Path, rng: random.Random) -> None:
    content = dict(pictures())[kind]
    path, taken, rejected = tmp_path / "x.jpg", 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3000):
            path.write_bytes(damaged_bytes(content, rng, among=rng.choice([200, len(content)])))
            for read in (read_image, image_size):
                try:
                    read(path)
                    taken += 1
                except ImageError:
                    rejected += 1
    assert rejected > 100 and taken + rejected == 6000


ROWS = {
    "published": {"md5": "aa", "caption_en": "a fox", "bw": 16, "bh": 16},
    "one caption": {"file_name": "aa.jpg", "text": "a"},
    "several": {"file_name": "aa.jpg", "captions": ["a", "b"], "weights": [1, 2.5]},
}


@pytest.mark.parametrize("kind", ROWS)
def test_lists_of_captions(kind: str, tmp_path: Path, rng: random.Random) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "aa.jpg")
    row = ROWS[kind]
    lines = [damaged_json(json.dumps(row), rng).replace("\n", " ") for _ in range(3000)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    items, rejects = list_items(tmp_path / "list.jsonl")
    assert len(items) > 100 and len(rejects) > 1000
    for item in items:
        assert all(caption.text.encode() and caption.weight > 0 for caption in item.captions)
        assert item.image.path.is_file()
        assert item.bucket is None or bucket_size(item.bucket)
    assert all(reject.name.startswith("list.jsonl:") and reject.reason for reject in rejects)


def test_lists_in_csv(tmp_path: Path, rng: random.Random) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "aa.jpg")
    whole = "file_name,text\n" + 'aa.jpg,"a fox, in the snow"\n' * 3
    refused = taken = 0
    for _ in range(1000):
        content = damaged_text(whole, rng).encode(errors="surrogatepass")
        (tmp_path / "list.csv").write_bytes(damaged_bytes(content, rng) if rng.random() < 0.3 else content)
        try:
            items, rejects = list_items(tmp_path / "list.csv")
        except ValueError as error:
            assert "list.csv" in str(error)
            refused += 1
            continue
        taken += len(items)
        assert all(reject.name.startswith("list.csv:") and reject.reason for reject in rejects)
    assert refused > 50 and taken > 500


def test_tars(tmp_path: Path, rng: random.Random) -> None:
    """Headers, captions and the ends of blocks alike."""
    path = tmp_path / "0.tar"
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        for key in range(3):
            row = json.dumps({"caption": ["a", "b"], "weights": [1, 2]}).encode()
            for suffix, content in (("png", picture.getvalue()), ("json", row), ("txt", b"")):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    whole = path.read_bytes()
    taken = rejected = 0
    for _ in range(3000):
        path.write_bytes(damaged_bytes(whole, rng))
        try:
            items, rejects = list_items(path)
        except ValueError as error:
            assert "0.tar holds no images" in str(error)
            continue
        taken, rejected = taken + len(items), rejected + len(rejects)
        for item in items:
            with contextlib.suppress(ImageError), item.image.open() as file:
                assert len(file.read()) <= len(whole)
    assert taken > 1000 and rejected > 300


def test_files_of_a_run(tmp_path: Path, rng: random.Random) -> None:
    written = {"checkpoint.json": DESCRIPTION, "lineage.json": LINEAGE, "complete.json": COMPLETE}
    refused = 0
    for name, content in written.items():
        for _ in range(500):
            (tmp_path / name).write_text(damaged_json(json.dumps(content), rng))
            refused += only_value_errors(lambda name=name: READERS[name](tmp_path))
    recipe = (ROOT / "recipes/tiny/soar.yaml").read_text()
    chain = (ROOT / "recipes/chains/tiny.yaml").read_text()
    for _ in range(300):
        (tmp_path / "run_config.yaml").write_text(damaged_text(recipe, rng))
        refused += only_value_errors(lambda: READERS["run_config.yaml"](tmp_path))
        (tmp_path / "chain.yaml").write_text(damaged_text(chain, rng))
        refused += only_value_errors(lambda: load_chain(tmp_path / "chain.yaml"))
    assert refused > 600


def test_captions(tmp_path: Path, rng: random.Random) -> None:
    for index in range(500):
        Image.new("RGB", (1, 1)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_bytes(damaged_bytes(b"a fox in the snow", rng))
    items, rejects = list_items(tmp_path)
    assert len(items) + len(rejects) == 500 and min(len(items), len(rejects)) > 50


def only_value_errors(work: Callable[[], object]) -> int:
    """1 where `work` refused, 0 where it went on; every refusal says something."""
    try:
        work()
    except ValueError as error:
        assert str(error)
        return 1
    return 0


def read_all(folder: Path) -> None:
    """Every sample of a folder of shards, as training reads them."""
    shards = open_shards(folder)
    shards.empty_prompt()
    for bucket in shards.info.buckets:
        members = shards.members(bucket)
        shards.read(bucket, members.tolist(), torch.arange(len(members)), seed=0)


@pytest.mark.parametrize(
    "name", ["dataset.json", "shard-000000.json", "shard-000000.tar", "empty.safetensors"]
)
def test_shards(name: str, shards: Path, tmp_path: Path, rng: random.Random) -> None:
    shutil.copytree(shards, tmp_path / "s")
    path = tmp_path / "s" / name
    whole = path.read_bytes()
    index = tmp_path / "s" / "index.bin"
    refused = 0
    for _ in range(400 if path.suffix == ".json" else 100):
        damaged = (
            damaged_json(whole.decode(), rng).encode()
            if path.suffix == ".json"
            else damaged_bytes(whole, rng, 4000)
        )
        path.write_bytes(damaged)
        if name == "shard-000000.json":
            index.unlink(missing_ok=True)  # which is made of it
        refused += only_value_errors(lambda: read_all(tmp_path / "s"))
    assert refused > 5


def test_a_damaged_index_of_all_shards_is_made_anew(shards: Path, tmp_path: Path, rng: random.Random) -> None:
    shutil.copytree(shards, tmp_path / "s")
    path = tmp_path / "s" / "index.bin"
    whole = path.read_bytes()
    for _ in range(100):
        path.write_bytes(damaged_bytes(whole, rng, 4000))
        read_all(tmp_path / "s")
        assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["dataset.json", "shard-000000.json", "prepare.json", "rejects.jsonl"])
def test_a_folder_that_is_prepared_again(name: str, tmp_path: Path, rng: random.Random) -> None:
    (tmp_path / "images").mkdir()
    for index in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / f"images/{index}.png")
    (tmp_path / "images/0.txt").write_text("a red 0")
    call = (tmp_path / "images", tmp_path / "out", BASE)
    prepare(*call, Options(skip_invalid=True))
    contents = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    if name in ("shard-000000.json", "prepare.json"):
        del contents["dataset.json"]  # they are read again while it is unfinished
    for _ in range(30):
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").mkdir()
        for file, content in contents.items():
            (tmp_path / "out" / file).write_bytes(content)
        (tmp_path / "out" / name).write_text(damaged_json(contents[name].decode(), rng))
        only_value_errors(lambda: prepare(*call, Options(skip_invalid=True)))


CONFIGS = [
    path.relative_to(BASE).as_posix()
    for path in sorted(BASE.rglob("*.json"))
    if path.name not in ("tokenizer.json", "vocab.json")
]


def described(folder: Path) -> None:
    """All that is said of a pipeline without loading it; what one reader refuses the others still have to read."""
    for read in (encoder_facts, fingerprints, read_sizes, pipeline_parts):
        only_value_errors(lambda read=read: read(folder))
    only_value_errors(lambda: scheduler_shift(folder, 16))


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, tmp_path: Path, rng: random.Random) -> None:
    shutil.copytree(BASE, tmp_path / "p")
    text = (BASE / name).read_text()
    for _ in range(300):
        os.unlink(tmp_path / "p" / name)
        (tmp_path / "p" / name).write_text(damaged_json(text, rng))
        described(tmp_path / "p")


ENCODER_FILES = ["text_encoder/config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
                 "text_encoder_3/model.safetensors", "tokenizer_3/tokenizer_config.json", "model_index.json",
                 "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", ENCODER_FILES)
def test_encoders(name: str, tmp_path: Path, rng: random.Random) -> None:
    shutil.copytree(BASE, tmp_path / "p")
    whole = (BASE / name).read_bytes()
    for _ in range(12):
        os.unlink(tmp_path / "p" / name)
        damaged = (
            damaged_json(whole.decode(), rng).encode()
            if name.endswith(".json")
            else damaged_bytes(whole, rng, 300)
        )
        (tmp_path / "p" / name).write_bytes(damaged)
        only_value_errors(lambda: Encoders.from_pipeline(tmp_path / "p"))


def test_weights(tmp_path: Path, rng: random.Random) -> None:
    whole = save({"a": torch.ones(4, 4), "b": torch.ones(3, dtype=torch.bfloat16)})
    index = json.dumps({"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "x.safetensors"}})

    def read() -> None:
        with Reader(tmp_path) as reader:
            for key in reader.files:
                reader.shape(key)
                reader.read(key)

    refused = 0
    for _ in range(2000):
        (tmp_path / SINGLE).write_bytes(damaged_bytes(whole, rng))
        refused += only_value_errors(read)
    (tmp_path / SINGLE).rename(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(whole)
    for _ in range(1000):
        (tmp_path / INDEX).write_text(damaged_json(index, rng))
        refused += only_value_errors(read)
    assert refused > 1000


def test_recipes(tmp_path: Path, rng: random.Random) -> None:
    recipe = ROOT / "recipes/tiny/soar.yaml"
    whole, refused = recipe.read_text(), 0
    for _ in range(600):
        (tmp_path / "x.yaml").write_text(damaged_text(whole, rng))
        refused += only_value_errors(lambda: load_recipe(tmp_path / "x.yaml"))
    for key in (
        "train.seed",
        "optimizer.lr",
        "optimizer.frozen",
        "logging.drift_spans",
        "model.dtype",
        "data.path",
    ):
        for _ in range(60):
            override = f"{key}={damaged_text('1', rng)}"
            refused += only_value_errors(lambda override=override: load_recipe(recipe, [override]))
    assert refused > 400
