"""Chains: runs that follow each other, each starting from what the one before made.

    folder: runs/chains/x                # each link works in a folder of its own in here
    pipeline_dir: recipes/tiny/base          # what the first link starts from
    slurm: {nodes: 2, time: "04:00:00"}  # for chain --slurm; a link may have its own
    links:
      - {name: sft, train: recipes/tiny/sft.yaml, overrides: [train.train_iters=200]}
      - {name: soar, train: recipes/tiny/soar.yaml, start: checkpoint}
      - {name: evaluate, evaluate: [--suite, tiny]}          # or [--held-out, SHARDS], drift alone
      - {name: export, export: []}
      - {name: other, command: [bash, other.sh, "{pipeline_dir}", "{folder}"], product: pipeline}
      - {name: rl_of_sft, from: sft, train: recipes/tiny/flow_grpo.yaml}  # not from the link before
      - {name: outside, from: soar, handoff: [--to, flow_grpo, --run-in, ../flow_grpo, --checkpoints, 5]}
      - name: rl  # with a process beside it that judges its samples (soar_mega/launch/reward_worker.py)
        train: recipes/tiny/flow_grpo.yaml
        reward_worker: {serve: [digits], slurm: {gpus_per_node: 0}}

Exports are float32, the optimizer's own numbers, unless a link says otherwise: the next one starts from them.

Reading a chain file resolves every path and checks every recipe, so that a mistake in the last link is found first.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.config import Recipe
from soar_mega.launch.reward_worker import FOLDER, RewardWorker
from soar_mega.launch.slurm import Resources, resources
from soar_mega.recipe import read_yaml
from soar_mega.stages import load_recipe

KINDS = ("train", "evaluate", "export", "handoff", "command")
STARTS = ("export", "export_ema", "checkpoint")
_KEYS = {
    "train": ("overrides", "start", "reward_worker"),
    "evaluate": (),
    "export": (),
    "handoff": (),
    "command": ("product",),
}
_TYPES = {"overrides": list, "reward_worker": dict}  # of these keys; others are text


@dataclass(frozen=True, kw_only=True)
class Link:
    """One link with all of its paths."""

    name: str
    kind: str  # train | evaluate | export | handoff | command
    folder: Path
    arguments: list[str]  # of the soar-mega command, or the words of a command
    product: Path  # what the link is for: verified by its hash
    parent: str | None  # the link whose product this one starts from; None: the chain's own pipeline
    after: str | None  # the link that must be done before this one begins; None: nothing
    recipe: Recipe | None = None  # of a train link
    is_parallel: bool = False  # all ranks of its job run its command, as of train links and suites
    worker: RewardWorker | None = None  # beside a train link
    resources: Resources


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A chain file, resolved."""

    file: Path
    pipeline_dir: Path
    links: list[Link]

    def link(self, name: str) -> Link:
        """A link by its name."""
        for link in self.links:
            if link.name == name:
                return link
        raise ValueError(
            f"{self.file}: no link {name!r}; links are {', '.join(each.name for each in self.links)}"
        )


def load_chain(path: str | Path) -> Chain:
    """Reads and checks a chain file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names the link and what would be right.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such chain file")
    read = read_yaml(path)
    known = {"folder": str, "pipeline_dir": str, "slurm": dict, "links": list}
    _check(read, known, str(path))
    for key in ("folder", "pipeline_dir", "links"):
        if not read.get(key):
            raise ValueError(f"{path}: {key} is missing")
    builder = _Builder(path, Path(read["folder"]), read["pipeline_dir"], read.get("slurm", {}))
    for number, settings in enumerate(read["links"]):
        builder.add(settings, f"{path}: link {number + 1}")
    return Chain(file=path, pipeline_dir=Path(read["pipeline_dir"]), links=builder.links)


class _Builder:
    """Adds links one by one and knows where the next one starts."""

    def __init__(self, file: Path, folder: Path, pipeline_dir: str, slurm: Mapping[str, Any]) -> None:
        self._file, self._folder, self._slurm = file, folder, slurm
        self._base = pipeline_dir
        self._pipeline, self._made_by = pipeline_dir, ""  # of now, and by which link
        self._run: Link | None = None  # the newest train link
        self._states: dict[str, tuple[str, str, Link | None]] = {}  # these three after each link
        self._after: str | None = None
        self.links: list[Link] = []

    def add(self, settings: Any, where: str) -> None:
        """Resolves one entry of `links`."""
        kinds = [kind for kind in KINDS if isinstance(settings, dict) and kind in settings]
        if len(kinds) != 1:
            raise ValueError(f"{where}: needs exactly one of {', '.join(KINDS)}")
        kind = kinds[0]
        types = {"name": str, "from": str, kind: str if kind == "train" else list, "slurm": dict}
        _check(settings, types | {key: _TYPES.get(key, str) for key in _KEYS[kind]}, where)
        name = settings.get("name", "")
        if not re.fullmatch(r"\w[\w.-]*", name) or name in {link.name for link in self.links}:
            raise ValueError(
                f"{where}: name: a word of its own is needed (it names the folder), found {name!r}"
            )
        where = f"{self._file}: {name}"
        make = {
            "train": self._train,
            "evaluate": self._evaluate,
            "export": self._export,
            "handoff": self._handoff,
            "command": self._command,
        }
        self._after = self.links[-1].name if self.links else None
        if "from" in settings:
            self._go_back(settings["from"], where)
        self.links.append(make[kind](settings, self._folder / name, where))
        self._states[name] = self._pipeline, self._made_by, self._run

    def _go_back(self, name: str, where: str) -> None:
        """To how things were after the link `name`."""
        if name not in self._states:
            before = ", ".join(self._states) or "none"
            raise ValueError(f"{where}: from: {name!r} is no link before this one; those are {before}")
        self._pipeline, self._made_by, self._run = self._states[name]
        self._after = name

    def _link(self, settings: Any, kind: str, where: str, **values: Any) -> Link:
        return Link(
            name=settings["name"],
            kind=kind,
            parent=self._made_by or None,
            after=self._after,
            resources=self._resources(settings, where, values.get("is_parallel", False)),
            **values,
        )

    def _resources(self, settings: Any, where: str, is_parallel: bool = False) -> Resources:
        """Of a job: the chain's, but for what its settings say; one process where it is not parallel."""
        wanted = {**self._slurm, **settings.get("slurm", {})}
        if not is_parallel:
            wanted |= {"nodes": 1, "processes_per_node": 1}
        return resources(wanted, f"{where}: slurm")

    def _train(self, settings: Any, folder: Path, where: str) -> Link:
        start = settings.get("start", "export")
        if start not in STARTS:
            raise ValueError(f"{where}: start: one of {', '.join(STARTS)}, found {start!r}")
        if start != "export" and (self._run is None or self._run.name != self._made_by):
            raise ValueError(
                f"{where}: start: {start} needs a train link before, and no other that makes weights between"
            )
        own = self._own_overrides(start, folder)
        said = list(map(str, settings.get("overrides", [])))
        for key in (word.split("=", 1)[0] for word in own):
            if _gives(said, key):
                raise ValueError(
                    f"{where}: overrides: {key} would go unheard: the chain's folder and pipeline_dir, and "
                    "a link's start and from, say where a run is and what it starts from"
                )
        overrides = ["checkpoint.export_dtype=fp32", *said, *own]
        worker = self._worker(settings, folder, where)
        try:
            recipe = load_recipe(settings["train"], overrides)
            if worker is not None:
                overrides += [worker.override(recipe)]
                recipe = load_recipe(settings["train"], overrides)
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from error
        self._check_start(start, recipe, where)
        if not recipe.checkpoint.export:
            raise ValueError(f"{where}: checkpoint.export=false, but a link is done by its export")
        arguments = ["train", settings["train"], *overrides]
        link = self._link(
            settings,
            "train",
            where,
            folder=folder,
            arguments=arguments,
            product=folder / "export",
            recipe=recipe,
            worker=worker,
            is_parallel=True,
        )
        self._pipeline, self._made_by, self._run = str(folder / "export"), link.name, link
        return link

    def _own_overrides(self, start: str, folder: Path) -> list[str]:
        """Where a train link's run is, and what it starts from."""
        save = f"checkpoint.save={folder}"
        if start == "export":
            return [save, f"model.pipeline_dir={self._pipeline}"]
        assert self._run is not None and self._run.recipe is not None
        if start == "export_ema":
            return [save, f"model.pipeline_dir={self._run.folder / 'export_ema'}"]
        return [
            save,
            f"model.pipeline_dir={self._run.recipe.model.pipeline_dir}",
            f"checkpoint.load={self._run.folder}",
            "checkpoint.finetune=true",
        ]

    def _worker(self, settings: Any, folder: Path, where: str) -> RewardWorker | None:
        """What judges beside a link, where it names such a thing."""
        if "reward_worker" not in settings:
            return None
        said, where = settings["reward_worker"], f"{where}: reward_worker"
        _check(said, {"serve": list, "slurm": dict}, where)
        words = list(map(str, said.get("serve", [])))
        return RewardWorker.of(words, folder / FOLDER, self._resources(said, where))

    def _check_start(self, start: str, recipe: Recipe, where: str) -> None:
        before = self._run.recipe if self._run else None
        if start == "export_ema" and before is not None and before.train.ema_decay == 0:
            raise ValueError(
                f"{where}: start: export_ema, but the link before keeps no EMA (train.ema_decay=0)"
            )
        if start == "checkpoint" and before is not None and (before.lora.rank > 0) != (recipe.lora.rank > 0):
            raise ValueError(
                f"{where}: start: checkpoint, but only one of the two links trains adapters (lora.rank): start: export "
                "takes the weights with the adapters in them"
            )

    def _evaluate(self, settings: Any, folder: Path, where: str) -> Link:
        asked = list(map(str, settings["evaluate"]))
        has_suite = _gives(asked, "--suite")
        if not has_suite and not _gives(asked, "--held-out"):
            raise ValueError(f"{where}: evaluate: name a --suite, or --held-out SHARDS for drift alone")
        out = folder if has_suite else folder / "metrics.json"
        now = self._made_by or "now"
        arguments = ["evaluate", f"start={self._base}", f"{now}={self._pipeline}", "--out", str(out), *asked]
        product = folder / "report.json" if has_suite else out
        return self._link(
            settings,
            "evaluate",
            where,
            folder=folder,
            arguments=arguments,
            product=product,
            is_parallel=has_suite,
        )

    def _export(self, settings: Any, folder: Path, where: str) -> Link:
        if self._run is None:
            raise ValueError(f"{where}: export needs a train link before it")
        out = folder / "pipeline"
        words = list(map(str, settings["export"]))
        dtype = [] if _gives(words, "--dtype") else ["--dtype", "fp32"]
        arguments = ["convert", str(self._run.folder), str(out), *words, *dtype]
        link = self._link(settings, "export", where, folder=folder, arguments=arguments, product=out)
        self._pipeline, self._made_by = str(out), link.name
        return link

    def _handoff(self, settings: Any, folder: Path, where: str) -> Link:
        words = list(map(str, settings["handoff"]))
        if not _gives(words, "--run-in"):
            raise ValueError(f"{where}: handoff: name the folder of the trainer's repository with --run-in")
        out = folder / "pipeline"
        arguments = ["handoff", self._pipeline, "--save", str(folder), *words]
        link = self._link(settings, "handoff", where, folder=folder, arguments=arguments, product=out)
        self._pipeline, self._made_by = str(out), link.name
        return link

    def _command(self, settings: Any, folder: Path, where: str) -> Link:
        if not settings.get("product"):
            raise ValueError(f"{where}: product: name what the command writes last, in {{folder}}: "
                             "an exit code alone proves nothing")  # fmt: skip
        if not settings["command"]:
            raise ValueError(f"{where}: command: name the program, and what it is to be told")
        words = {"{pipeline_dir}": self._pipeline, "{folder}": str(folder), "{base}": self._base,
                 "{run}": str(self._run.folder) if self._run else ""}  # fmt: skip
        pattern = re.compile("|".join(re.escape(word) for word in words))
        arguments = [pattern.sub(lambda found: words[found[0]], str(word)) for word in settings["command"]]
        product = folder / settings["product"]
        link = self._link(settings, "command", where, folder=folder, arguments=arguments, product=product)
        if settings["product"] == "pipeline":
            self._pipeline, self._made_by = str(product), link.name
        return link


def _gives(words: list[str], option: str) -> bool:
    """Whether an option or a setting is among the words of a command, as --option X, --option=X or setting=X."""
    return any(word.split("=", 1)[0] == option for word in words)


def _check(settings: Any, known: Mapping[str, type], where: str) -> None:
    """ValueError for an unknown key or a value of a wrong type."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: expected `key: value` lines, found {settings!r}")
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; the keys are {', '.join(known)}")
        if not isinstance(value, known[key]):
            raise ValueError(f"{where}: {key}: expected {known[key].__name__}, found {value!r}")
