"""The built-in data of a sweep: shards to train on, held-out ones, and prompts that the verifier can judge."""

import json
from pathlib import Path

from sweeping.plan import WRITTEN_BY, Canvases
from walk.data import prepare_data

from soar_mega.data.remote import read_info
from soar_mega.data.shard_writer import DATASET_FILE
from soar_mega.examples.digits.benchmark import OCR, benchmark_prompts
from soar_mega.outputs import write_file

PROMPTS_SEED = 4000


def prepare(folder: Path, pipeline_dir: str, canvases: Canvases, threads: int) -> None:
    """Makes what is not there yet: FOLDER/shards/{train,heldout}, FOLDER/prompts/canvases.

    Raises:
        ValueError: there are prompts that this program did not write, or other shards than the sweep asks for.
    """
    shards = folder / "shards"
    if not (shards / "heldout" / DATASET_FILE).exists():
        print("preparing the data ...", flush=True)
        prepare_data(folder, Path(pipeline_dir), canvases.train, canvases.held_out, max(1, threads // 2))
    for name, key, wanted in (("train", "train", canvases.train), ("heldout", "held_out", canvases.held_out)):
        if (there := read_info(str(shards / name)).samples) != wanted:
            raise ValueError(
                f"{shards / name} holds {there} canvases, and canvases.{key} is {wanted}: give the sweep another folder"
            )
    lines = [
        json.dumps({"prompt": caption.text, "written_by": WRITTEN_BY, "tag": caption.kind})
        for caption in benchmark_prompts(canvases.prompts_per_category, PROMPTS_SEED)
        if caption.kind != OCR
    ]
    content = "\n".join([*lines, ""]).encode()
    write_file(folder / "prompts" / "canvases" / "test_metadata.jsonl", content, WRITTEN_BY.encode())
