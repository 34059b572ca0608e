"""A real SLURM of four nodes on this machine, all of it in one folder.

    python tests/slurm/cluster.py            start it, say what to export, and stop it on ctrl-C

Each node is a slurmd with a host name, an /etc/hosts and an address of its own; they share the machine's files, as
nodes share a parallel file system. Needs root (mount and UTS namespaces) and what install.sh installs.
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "setpriv")

CONFIG = """\
ClusterName=emulated
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=15
InactiveLimit=0
MinJobAge=300
KillWait=60
Waittime=0
GresTypes=gpu
NodeName=n[1-4] NodeHostname=n[1-4] NodeAddr=127.0.0.1[1-4] Port=[{first}-{last}] CPUs=8 RealMemory=4000 Gres=gpu:2
PartitionName=batch Nodes=n[1-4] Default=YES PriorityTier=1 GraceTime=120 MaxTime=60 DefaultTime=10
PartitionName=urgent Nodes=n[1-4] PriorityTier=10 PreemptMode=OFF MaxTime=60 DefaultTime=10
"""


class Cluster:
    """Starts with `start`, or as a context manager; `call` runs client commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when four nodes are idle.

        Raises:
            RuntimeError: they are not within a minute; the message holds the ends of the daemons' logs.
        """
        self.folder.chmod(0o755)  # munged wants its socket to be reachable for everyone
        for name in ("munge", "state", "run", "log", "dev"):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        port = _free_ports(1 + len(NODES))
        text = CONFIG.format(folder=self.folder, port=port, first=port + 1, last=port + len(NODES))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        gpus = [f"NodeName={name} Name=gpu File={self.folder}/dev/{name}gpu[0-1]" for name in NODES]
        (self.folder / "gres.conf").write_text("\n".join([*gpus, ""]))
        for device in (f"{name}gpu{i}" for name in NODES for i in range(2)):
            os.mknod(self.folder / "dev" / device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # null devices
        hosts = [f"127.0.0.1{i} {name}" for i, name in enumerate(NODES, 1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        (self.folder / "munge" / "key").write_bytes(os.urandom(128))
        (self.folder / "munge" / "key").chmod(0o600)
        files = {
            "socket": "socket",
            "key-file": "key",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        where = [f"--{option}={self.folder}/munge/{name}" for option, name in files.items()]
        self._start("munged", ["munged", "--foreground", *where])
        _poll(lambda: (self.folder / "munge" / "socket").exists(), 20, self._trouble)
        self._start("slurmctld", self._on_host("localhost", ["slurmctld", "-D", "-c"]))
        for name in NODES:
            self.start_node(name)
        _poll(lambda: self.states() == dict.fromkeys(NODES, "idle"), 60, self._trouble)

    def start_node(self, name: str) -> None:
        """Boots a node."""
        self._start(name, self._on_host(name, ["slurmd", "-D", "-N", name]))

    def kill_node(self, name: str) -> None:
        """Kills a node's slurmd: from now on the controller hears nothing of it."""
        self._daemons[name].kill()
        self._daemons.pop(name).wait()

    def states(self) -> dict[str, str]:
        """{node: state} as sinfo tells it; empty while the controller does not answer."""
        told = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %t"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return dict(line.split() for line in told.stdout.splitlines()) if told.returncode == 0 else {}

    def call(self, *command: str) -> str:
        """The output of a client command (sbatch, scontrol, ...)."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}\n{self._trouble()}")
        return done.stdout

    def stop(self) -> None:
        """Cancels all jobs, waits until they are gone, and ends the daemons."""
        if "slurmctld" in self._daemons:
            subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and self._squeue():
                time.sleep(0.5)
        for name in (*NODES, "slurmctld", "munged"):
            daemon = self._daemons.pop(name, None)
            if daemon is None:
                continue
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _squeue(self) -> str:
        told = subprocess.run(["squeue", "--noheader"], env=self.environment, capture_output=True, text=True)
        return told.stdout.strip()

    def _on_host(self, name: str, command: Sequence[str]) -> list[str]:
        """The command as seen by a machine of this name, which dies with this process."""
        script = 'mount --bind "$0/hosts" /etc/hosts && hostname "$1" && shift && exec "$@"'
        return ["unshare", "--mount", "--uts", "bash", "-c", script, str(self.folder), name, *command]

    def _start(self, name: str, command: Sequence[str]) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _trouble(self) -> str:
        logs = sorted((self.folder / "log").glob("*"))
        return "\n".join(f"--- {log.name}\n{_end(log)}" for log in logs if log.stat().st_size)


def missing() -> str | None:
    """Why there can be no cluster on this machine, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    probe = subprocess.run(
        ["unshare", "--mount", "--uts", "bash", "-c", "mount --bind /etc/hostname /etc/hosts && hostname n1"],
        capture_output=True,
        text=True,
    )
    return None if probe.returncode == 0 else f"no namespaces here (root is needed): {probe.stderr.strip()}"


def _poll(happened: Callable[[], bool], seconds: float, trouble: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the cluster did not start within {seconds} seconds\n{trouble()}")
        time.sleep(0.2)


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-8:])


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody uses, below those that the kernel gives away itself."""
    for first in range(16817, 30000, 16):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("0.0.0.0", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


def main() -> int:
    """A cluster to try things on, until ctrl-C."""
    reason = missing()
    if reason is not None:
        print(f"{reason}; run tests/slurm/install.sh", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="slurm.") as folder, Cluster(Path(folder)) as cluster:
        print(
            f"four nodes are idle; in another terminal:\n  export SLURM_CONF={cluster.folder}/slurm.conf",
            flush=True,
        )
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
