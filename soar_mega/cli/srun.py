"""Processes that srun started itself, without torchrun."""

import os
import re

# by the job's number, below those that Linux gives to connections (from 32768 on)
FIRST_PORT, PORTS = 20_000, 12_000


def adopt_srun() -> None:
    """Where srun started the processes itself, gives them the environment that torchrun would.

    To be called before `start_process`, which looks at this environment.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    first_nodes = re.match(r"(?:[^,\[]|\[[^]]*\])+", os.environ["SLURM_STEP_NODELIST"])
    assert first_nodes is not None
    first_node = re.sub(r"\[(\w+)[^]]*\]", r"\1", first_nodes[0])
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ.setdefault("MASTER_ADDR", first_node)
    os.environ.setdefault("MASTER_PORT", str(FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % PORTS))
