"""The run folder: its lock, its checkpoints' names, the tracker file and the completion marker.

    run.lock                               the process that writes; where it is, what is named here is this program's
    run_config.yaml                        the recipe with all values resolved; those of earlier starts that were
                                           others are run_config.1.yaml and so on
    lineage.json                           what it started from, and the code of each start
    latest_checkpointed_iteration.txt      the iteration to resume from
    iter_0000100/                          checkpoints; names ending in .tmp or .deleted are leftovers of a crash,
                                           and those ending in .broken are damaged ones that were kept aside
    tensorboard/ samples/ train.log        what was measured
    prompts/ collections/                  embeddings of its prompts, and samples it learned from, where it draws them
    export/ export_ema/                    diffusers pipelines of the finished run
    anomalies.jsonl failures/              steps to look at; why a start could not go on
    complete.json                          written last: the run reached train_iters; and was exported, or says that not

Everything here is done by rank 0 alone, on plain files.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from soar_mega.outputs import refuse_overlap, sync
from soar_mega.user_files import read_object, whole

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
MARKER = "complete.json"
LOCK = "run.lock"
RECIPE = "run_config.yaml"
DESCRIPTION = "checkpoint.json"  # in each checkpoint
OWN_NAMES = re.compile(
    r"iter_\d{7,}(\.\w+)?|run_config(\.\d+)?\.yaml|lineage\.json|complete\.json|" + re.escape(TRACKER)
)
TEMPORARY, DELETED, BROKEN = ".tmp", ".deleted", ".broken"


class RunFolder:
    """Names and states of one run folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def checkpoint(self, iteration: int) -> Path:
        """The folder of a checkpoint."""
        return self.path / f"iter_{iteration:07d}"

    def is_one(self) -> bool:
        """Whether this program wrote runs here."""
        return (self.path / LOCK).exists() or any(self.path.glob(f"iter_*/{DESCRIPTION}"))

    def is_export(self, path: str | Path) -> bool:
        """Whether a path is, or lies in, an export of this run: export, export_ema, export_500 and so on."""
        return os.path.relpath(os.path.realpath(path), os.path.realpath(self.path)).startswith("export")

    def iterations(self) -> list[int]:
        """Iterations whose checkpoint folders are complete, oldest first."""
        names = (
            re.fullmatch(r"iter_(\d{7,})", entry.name) for entry in self.path.iterdir() if entry.is_dir()
        )
        return sorted(int(name[1]) for name in names if name)

    def latest(self) -> int | None:
        """The iteration to resume from, None in a fresh folder.

        Raises:
            ValueError: the tracker file is unreadable, or names a checkpoint that is not there.
        """
        iteration = self._tracked()
        if iteration is not None and not self.checkpoint(iteration).is_dir():
            raise ValueError(f"{self.path / TRACKER}: names iteration {iteration}, but {self.checkpoint(iteration)} is "
                             f"missing; complete checkpoints here: {self.iterations()}")  # fmt: skip
        return iteration

    def candidates(self) -> list[int]:
        """Iterations to resume from, the best first; empty in a fresh folder.

        The one that the tracker names, then older ones, then newer ones: these are of a run that was set back, or a
        crash kept the tracker from naming them.

        Raises:
            ValueError: the tracker file is unreadable.
        """
        tracked = self._tracked()
        if tracked is None:
            return []
        there = [iteration for iteration in reversed(self.iterations()) if iteration != tracked]
        return [tracked, *(i for i in there if i < tracked), *(i for i in there if i > tracked)]

    def _tracked(self) -> int | None:
        tracker = self.path / TRACKER
        if not tracker.exists():
            return None
        text = tracker.read_text().strip()
        if not text.isdigit():
            raise ValueError(f"{tracker}: holds {text!r} instead of an iteration number; write one of "
                             f"{self.iterations()} into it, or remove it to start from the beginning")  # fmt: skip
        return int(text)

    def set_aside(self, iteration: int) -> Path | None:
        """Renames a damaged checkpoint to iter_0000100.broken, or .broken-2 and so on, and says where it is now."""
        folder = self.checkpoint(iteration)
        if not folder.is_dir():
            return None
        aside = folder.with_name(folder.name + BROKEN)
        count = 1
        while aside.exists():
            count += 1
            aside = folder.with_name(f"{folder.name}{BROKEN}-{count}")
        os.rename(folder, aside)
        sync(self.path)
        return aside

    def set_latest(self, iteration: int) -> None:
        """Points the tracker at a checkpoint, atomically and durably."""
        write_durably(self.path / TRACKER, str(iteration))

    def complete(self) -> dict[str, int] | None:
        """What the completion marker says, None for an unfinished run.

        Raises:
            ValueError: the marker is damaged, or somebody else's.
        """
        marker = self.path / MARKER
        if not marker.exists():
            return None
        said = read_object(marker, "remove it and start the run again, which then completes anew")
        whole(said, "iteration", marker, least=0, most=2**62)
        whole(said, "consumed_samples", marker, least=0, most=2**62)
        return said

    def mark_complete(self, iteration: int, consumed_samples: int, exported: bool = True) -> None:
        """Writes the completion marker: the very last act of a run."""
        said = {"iteration": iteration, "consumed_samples": consumed_samples}
        if not exported:
            said["exported"] = False
        write_durably(self.path / MARKER, json.dumps(said) + "\n")

    def reopen(self) -> None:
        """Takes the completion marker away: the run goes on."""
        (self.path / MARKER).unlink()

    def clean(self) -> None:
        """Removes what a crash in the middle of a save or of a removal left."""
        for entry in self.path.iterdir():
            if re.fullmatch(rf"iter_\d{{7,}}({re.escape(TEMPORARY)}|{re.escape(DELETED)})", entry.name):
                if entry.suffix == TEMPORARY:
                    logger.warning("%s was being written when the run ended: it is lost, and removed", entry)
                if entry.is_symlink():  # of a checkpoint that was moved elsewhere
                    entry.unlink()
                else:
                    shutil.rmtree(entry)

    def prune(self, keep_last: int, retain_interval: int = 0) -> list[Path]:
        """Takes away all but `keep_last` checkpoints (0 keeps all): the one that the tracker names stays, and what
        `candidates` has next. So newer ones, of a run that was set back, go first.

        One that was moved elsewhere, with a link in its place, stays, and so do those of each `retain_interval`-th
        iteration (0: none for this reason). The others are renamed, so that no half-removed folder looks like a whole
        one, and returned: the caller removes them.
        """
        taken = []
        ours = [i for i in self.candidates() if (self.checkpoint(i) / DESCRIPTION).is_file()]
        for iteration in reversed(ours[keep_last:] if keep_last else []):
            folder = self.checkpoint(iteration)
            is_retained = retain_interval and iteration % retain_interval == 0
            if not is_retained and not folder.is_symlink():
                doomed = folder.with_name(folder.name + DELETED)
                os.rename(folder, doomed)
                taken.append(doomed)
        return taken

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; the lock goes away with the process, however it ends.

        Raises:
            ValueError: another run writes this folder, or it holds what only looks like a run.
        """
        self._refuse_foreign()
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(
                    f"{self.path}: another run is writing this folder ({file.read().strip() or 'unknown process'}); "
                    "wait for it, or give this run its own folder with checkpoint.save=..."
                ) from None
            except OSError as error:  # some network file systems have no locks
                logger.warning(
                    "%s cannot be locked (%s): make sure that no other run writes it", self.path, error
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def _refuse_foreign(self) -> None:
        """A run removes and replaces what has certain names: they must be its own."""
        if not self.path.exists() or self.is_one():
            return
        foreign = sorted(entry.name for entry in self.path.iterdir() if OWN_NAMES.fullmatch(entry.name))
        if foreign:
            raise ValueError(
                f"{self.path} holds {foreign[0]}, which this program did not write: give this run a folder of its own "
                f"with checkpoint.save=... (if it is a run of this program, make an empty file {LOCK} in it)"
            )


def check_place(out: str | Path, checkpoint: Path) -> None:
    """ValueError where what is made of a checkpoint would replace a part of its run, other than an export."""
    refuse_overlap(out, {"the checkpoint": checkpoint})
    run = RunFolder(checkpoint.parent)
    if run.is_one() and not run.is_export(out):
        refuse_overlap(out, {"the run": run.path})


def write_durably(path: Path, text: str) -> None:
    """Replaces a file by `text` so that a crash at any moment leaves the old text or the new one on the disk."""
    temporary = path.with_name(path.name + TEMPORARY)
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)
