"""docs/gpu.md from benchmarks/results: what was ever run on which GPU, with which versions.

python tools/gpu_page.py        after a new file in benchmarks/results
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from arguments import no_arguments

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu.md"

Json = dict[str, Any]

HEAD = """\
# What was run on a GPU

This page is made by `tools/gpu_page.py` from `benchmarks/results`. What is not on it was not run on a GPU: it was
tested on CPUs (gloo) alone.

    make test-gpu             the tests that need a GPU (tests/gpu); `make test` runs everything else with GPUs hidden
    tools/gpu_check.sh        these and the demo side by side, in about five minutes; writes the file for this page
"""

CHECKS = """\
## The newest result of each check

Only a file of `tools/gpu_check.sh` counts here; what was run by hand is further down.
"""


def page(results: Path) -> str:
    """The whole page."""
    found = on_gpus(results)
    parts = [HEAD, CHECKS, *checks_now(found)]
    for file, said in found:
        parts += ["", *section(file, said)]
    return "\n".join(parts) + "\n"


def on_gpus(results: Path) -> list[tuple[str, Json]]:
    """(file name, content) of what was measured on a GPU, the newest first."""
    files = [(file.name, json.loads(file.read_text())) for file in results.glob("*.json")]
    there = [(name, said) for name, said in files if is_gpu(said.get("device", "cpu"))]
    return sorted(there, key=lambda one: (one[1]["date"], one[0]), reverse=True)


def is_gpu(device: str) -> bool:
    """Whether a device is one; tools/bench_kernels.py predicts for "none: ..."."""
    return device != "cpu" and not device.startswith("none")


def checks_now(found: Sequence[tuple[str, Json]]) -> list[str]:
    """A row for each part of the check, with the newest file that has it."""
    names = [*sorted(file.stem for file in (ROOT / "tests/gpu").glob("test_*.py")), "demo"]
    rows = []
    for name in names:
        newest = next((one for one in found if name in one[1].get("parts", {})), None)
        if newest is None:
            rows.append([name, "not run on a GPU", "", "", ""])
            continue
        file, said = newest
        where = [f"{said['date']}, {said['device']}", said["commit"], link(file)]
        rows.append([name, outcome(said["parts"][name]), *where])
    return table(["part", "outcome", "when and where", "commit", "file"], rows)


def section(file: str, said: Json) -> list[str]:
    """What one file says, with where it comes from."""
    versions = {"torch": said["torch"], **said.get("versions", {})}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    lines = [f"## {said['date']}, {said['device']}: {said['tool']}", ""]
    lines += [said["note"], ""] if "note" in said else []
    lines += [
        f"Commit {said.get('commit', 'not recorded')}; {listed}. Command: `{said['command']}`. {link(file)}."
    ]
    rows = [[check["what"], check["outcome"]] for check in said.get("checks", [])]
    rows += [[name, outcome(part)] for name, part in said.get("parts", {}).items()]
    if rows:
        lines += ["", *table(["what", "outcome"], rows)]
    for each in said.get("tables", []):
        lines += ["", f"{each['title']}:", "", *table(each["columns"], each["rows"])]
    return lines


def outcome(part: Json) -> str:
    """What came of a part of tools/gpu_check.py, with what did not pass."""
    counts = Counter(test["outcome"] for test in part["tests"])
    counted = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    failed = "; ".join(test["name"] for test in part["tests"] if test["outcome"] == "failed")
    return f"{part['outcome']}{f' ({counted})' if counted else ''}{f': {failed}' if failed else ''}"


def link(file: str) -> str:
    """To a file of benchmarks/results, from docs."""
    return f"[{file}](../benchmarks/results/{file})"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [list(columns), ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def main() -> None:
    no_arguments(__doc__)
    PAGE.write_text(page(RESULTS))
    print(f"Written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
