"""The built-in data of a sweep: shards to train on, held-out ones, and prompts that the verifier can judge."""

import json
from pathlib import Path

from sweeping.plan import WRITTEN_BY, Canvases
from walk.data import prepare_data

from soar_mega.examples.digits.benchmark import OCR, benchmark_prompts
from soar_mega.outputs import write_file

PROMPTS_SEED = 4000


def prepare(folder: Path, pipeline_dir: str, canvases: Canvases, threads: int) -> None:
    """Makes what is not there yet: FOLDER/shards/{train,heldout}, FOLDER/prompts/{canvases,numbers}.

    Raises:
        ValueError: there are prompts that this program did not write.
    """
    if not (folder / "shards" / "heldout" / "dataset.json").exists():
        print("preparing the data ...", flush=True)
        prepare_data(folder, Path(pipeline_dir), canvases.train, canvases.held_out, max(1, threads // 2))
    captions = benchmark_prompts(canvases.prompts_per_category, PROMPTS_SEED)
    lines: dict[str, list[str]] = {"canvases": [], "numbers": []}
    for caption in captions:
        said = {"prompt": caption.text, "written_by": WRITTEN_BY}
        if caption.kind == OCR:
            lines["numbers"].append(json.dumps(said))
        else:
            lines["canvases"].append(json.dumps(said | {"tag": caption.kind}))
    for name, each in lines.items():
        content = "\n".join([*each, ""]).encode()
        write_file(folder / "prompts" / name / "test_metadata.jsonl", content, WRITTEN_BY.encode())
