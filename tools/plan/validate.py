"""The planner's order of layouts against that of four gloo processes here, by Spearman's rank correlation."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from origin import origin
from tqdm import tqdm

from plan.gloo import LAYOUTS, SHAPE, SIZES, TEXT, recipe_of
from plan.hardware import HARDWARE
from plan.step_time import StepModel
from soar_mega.models.common.flops import Tokens, image_tokens
from soar_mega.models.common.memory import workload

PROCESSES = 4
TOOLS = Path(__file__).parents[1]


def validate(out: str) -> None:
    """Prints both times of each layout and the correlation; writes them to `out` unless it is empty."""
    rows = []
    for layout in tqdm(LAYOUTS):
        rows.append({"layout": layout, "measured": _measured(layout), "predicted": predicted(layout)})
    rows.sort(key=lambda row: row["measured"])
    correlation = spearman([row["measured"] for row in rows], [row["predicted"] for row in rows])
    print(f"{'measured s':>11} {'predicted s':>12}  layout")
    for row in rows:
        print(f"{row['measured']:11.3f} {row['predicted']:12.3f}  {row['layout']}")
    print(f"rank correlation (Spearman): {correlation:.2f}")
    if out:
        content = {
            **origin("plan_layout"),
            "processes": PROCESSES,
            **machine(),
            "spearman": correlation,
            "rows": rows,
        }
        Path(out).write_text(json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, float | int]:
    """How busy this machine was: times of one that is are noise."""
    return {"cores": len(os.sched_getaffinity(0)), "load_average_15_min": os.getloadavg()[2]}


def predicted(layout: str) -> float:
    """Seconds of a step by the model."""
    recipe = recipe_of(layout)
    parallel = recipe.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    data_size = PROCESSES // (ranks * parallel.context_parallel_size)
    tokens = Tokens(image_tokens(SIZES, SHAPE[1:]), TEXT)
    model = StepModel(SIZES, recipe, HARDWARE["cpu"], data_size, PROCESSES, tokens)
    return model.step(workload(recipe, data_size, SHAPE[1:], TEXT)).total


def spearman(left: list[float], right: list[float]) -> float:
    """The correlation of the ranks of two lists without ties."""
    ranks = [{value: place for place, value in enumerate(sorted(values))} for values in (left, right)]
    squares = sum((ranks[0][a] - ranks[1][b]) ** 2 for a, b in zip(left, right, strict=True))
    return 1 - 6 * squares / (len(left) * (len(left) ** 2 - 1))


def _measured(layout: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={PROCESSES}", "-m", "plan.measure", str(found), layout]
        path = os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        if done.returncode:
            raise RuntimeError(f"{layout} failed:\n{done.stderr[-2000:]}")
        return json.loads(found.read_text())["seconds"]
