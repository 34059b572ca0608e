"""The planner's order of layouts against that of four gloo processes here, by Spearman's rank correlation."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from origin import origin
from tqdm import tqdm

from plan.gloo import LAYOUTS, SHAPE, SIZES, TEXT, TOKENS, recipe_of
from plan.hardware import Hardware
from plan.step_time import StepModel
from soar_mega.models.common.memory import workload

PROCESSES = 4
TOOLS = Path(__file__).parents[1]


def validate(out: Path | None) -> None:
    """Prints both times of each layout and the correlation; writes them to `out` where there is one."""
    load = os.getloadavg()[0]  # before anything of this runs: times of a busy machine are noise
    constants = run("plan.calibrate")
    hardware = process_of(constants)
    rows = []
    for layout in tqdm(LAYOUTS):
        seconds = run("plan.measure", layout)["seconds"]
        rows.append({"layout": layout, "measured": seconds, "predicted": predicted(layout, hardware)})
    rows.sort(key=lambda row: row["measured"])
    correlation = spearman([row["measured"] for row in rows], [row["predicted"] for row in rows])
    print(f"{'measured s':>11} {'predicted s':>12}  layout")
    for row in rows:
        print(f"{row['measured']:11.3f} {row['predicted']:12.3f}  {row['layout']}")
    print(f"rank correlation (Spearman): {correlation:.2f}")
    if out is not None:
        content = {
            **origin("plan_layout"),
            "processes": PROCESSES,
            "cores": len(os.sched_getaffinity(0)),
            "load_average_before": load,
            "constants": constants,
            "spearman": correlation,
            "rows": rows,
        }
        out.write_text(json.dumps(content, indent=1) + "\n")


def process_of(constants: dict[str, Any]) -> Hardware:
    """A process on this machine, by what `plan.calibrate` found; the time of its Python is left out."""
    return Hardware(
        memory="",
        gemm=constants["gemm"],
        tile=(1, 1),
        units=1,
        attention=tuple(constants["attention"]),
        attention_128=1.0,
        copy=constants["copy"],
        optimizer=90,
        link=constants["link"],
        network=constants["link"],
        link_latency=constants["link_latency"],
        network_latency=constants["link_latency"],
        layer_host=(0.0, 0.0),
        layer_host_graphs=(0.0, 0.0),
    )


def predicted(layout: str, hardware: Hardware) -> float:
    """Seconds of a step by the model."""
    recipe = recipe_of(layout)
    parallel = recipe.parallel
    data_size = PROCESSES // parallel.replica_size
    model = StepModel(SIZES, recipe, hardware, data_size, PROCESSES, TOKENS)
    return model.step(workload(recipe, data_size, SHAPE[1:], TEXT)).total


def spearman(left: list[float], right: list[float]) -> float:
    """The correlation of the ranks of two lists; equal values share the mean of their places."""
    ranks = [[sum((a < b) + (a == b) / 2 for a in values) for b in values] for values in (left, right)]
    return statistics.correlation(*ranks)


def run(module: str, *arguments: str) -> dict[str, Any]:
    """What a module of plan/ finds in four processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={PROCESSES}", "-m", module, str(found), *arguments]
        path = os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        if done.returncode:
            raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
        return json.loads(found.read_text())
