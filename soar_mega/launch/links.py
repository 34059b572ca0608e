"""Links of a chain: what they start from, whether they are done, and their markers.

    link.json        written when a link begins: its settings, and the hash of what it starts from
    completed.json   its completion marker, written last: the same, and the hash of what it made
    failure.txt      why its last start failed

A link is done when its marker is there and all that it says still holds: the same settings, a parent and a product
with the hashes that it names. An exit code proves nothing.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soar_mega.checkpoints.lineage import code_version, content_hash
from soar_mega.checkpoints.recipes import by_name, differences
from soar_mega.checkpoints.run_folder import RunFolder, write_durably
from soar_mega.launch.chain import Chain, Link
from soar_mega.stages import load_recipe
from soar_mega.user_files import read_object

BEGUN, COMPLETED, FAILURE = "link.json", "completed.json", "failure.txt"
ADVICE = "remove it, and the link is done again"

Json = dict[str, Any]


def why_not_done(chain: Chain, link: Link) -> str | None:
    """None when the link is done, else the reason.

    Raises:
        ValueError: a train link has begun with other settings or from another parent; to go on would mix the two.
    """
    marker = _read(link.folder / COMPLETED)
    begun = marker or _read(link.folder / BEGUN)
    if begun is None:
        return "not begun"
    changed = sorted(differences(begun["settings"], _settings(link)))
    if begun["parent"] != _parent_hash(chain, link):
        changed.append(f"its parent was made anew ({link.parent or chain.pipeline_dir})")
    if changed:
        why = f"{'completed' if marker else 'begun'} differently: {'; '.join(changed)}"
        if link.kind != "train":
            return why
        raise ValueError(
            f"link {link.name} was {why}. Remove {link.folder} to do it again, or give the chain another folder"
        )
    if marker is None:
        return "not complete"
    if not link.product.exists():
        return f"{link.product} is missing"
    if content_hash(link.product) != marker["product"]:
        return f"{link.product} is not what {link.folder / COMPLETED} vouches for"
    return None


def begin(chain: Chain, link: Link) -> bool:
    """Verifies what a link starts from and writes link.json; False when there is nothing to do.

    Raises:
        ValueError: the parent is not done, or see `why_not_done`.
    """
    if link.parent is not None:
        why = why_not_done(chain, chain.link(link.parent))
        if why is not None:
            raise ValueError(f"link {link.name} cannot begin, because link {link.parent} is not done: {why}")
    (link.folder / FAILURE).unlink(missing_ok=True)
    if why_not_done(chain, link) is None:
        return False
    link.folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(link.folder)
    broken = (link.folder / COMPLETED).exists() or not link.product.exists()
    if link.kind == "train" and run.complete() is not None and broken:
        run.reopen()  # there is nothing left to train: it exports again
    (link.folder / COMPLETED).unlink(missing_ok=True)
    if link.kind == "evaluate":
        # of what the parent was before; images and scores are kept apart by hash
        link.product.unlink(missing_ok=True)
    said = {"link": link.name, "settings": _settings(link), "parent": _parent_hash(chain, link)}
    write_durably(link.folder / BEGUN, json.dumps(said, indent=1) + "\n")
    return True


def check_submitted(link: Link, arguments: list[str]) -> None:
    """ValueError where a job that was submitted with these arguments would not do what the chain file says by now."""
    recipe = None if link.recipe is None else load_recipe(arguments[1], arguments[2:])
    submitted = dataclasses.replace(link, arguments=arguments, recipe=recipe)
    changed = sorted(differences(_settings(submitted), _settings(link)))
    if changed:
        raise ValueError(
            f"link {link.name} was changed after its job was submitted: {'; '.join(changed)}. Submit the chain again"
        )


def end(link: Link) -> None:
    """Verifies what a link made and writes its completion marker.

    Raises:
        ValueError: it did not make it.
    """
    if link.recipe is not None:
        said = RunFolder(link.folder).complete()
        if said is None or said["iteration"] < link.recipe.train.train_iters:
            raise ValueError(f"link {link.name} ended, but its run in {link.folder} is not complete")
    if not link.product.exists():
        raise ValueError(f"link {link.name} ended without its product {link.product}")
    begun = _read(link.folder / BEGUN)
    assert begun is not None, "a link begins before it ends"
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    marker = begun | {"product": content_hash(link.product), "code": code_version(), "time": when}
    write_durably(link.folder / COMPLETED, json.dumps(marker, indent=1) + "\n")


@contextlib.contextmanager
def failure_noted(link: Link) -> Iterator[None]:
    """Writes the message of an error into failure.txt of the link, for those who ask for its status."""
    try:
        yield
    except (ValueError, OSError) as error:
        link.folder.mkdir(parents=True, exist_ok=True)
        (link.folder / FAILURE).write_text(f"{error}\n")
        raise


def failure(link: Link) -> str | None:
    """Why the last start of a link failed."""
    path = link.folder / FAILURE
    return path.read_text().strip() if path.exists() else None


def _settings(link: Link) -> Json:
    """What makes the link's product: not where and how fast it is made."""
    if link.recipe is None:
        return {"arguments": link.arguments}
    recipe = dataclasses.asdict(link.recipe)
    del recipe["parallel"], recipe["logging"]
    for key in ("num_workers", "cache_dir", "cache_gb"):
        del recipe["data"][key]
    for key in ("exit_duration_in_mins", "step_timeout_minutes", "phase_timeout_minutes"):
        del recipe["train"][key]
    for key in ("save_interval", "async_save", "keep_last", "save_retain_interval"):
        del recipe["checkpoint"][key]
    return by_name(recipe)


def _parent_hash(chain: Chain, link: Link) -> str | None:
    """The hash of what a link starts from; None while the parent is not complete."""
    if link.parent is None:
        return content_hash(chain.pipeline_dir / "transformer")
    marker = _read(chain.link(link.parent).folder / COMPLETED)
    return None if marker is None else marker["product"]


def _read(path: Path) -> Json | None:
    if not path.exists():
        return None
    content = read_object(path, ADVICE)
    if not isinstance(content.get("settings"), dict):
        raise ValueError(f"{path}: settings is no object: {ADVICE}")
    for key in ("parent", "product") if path.name == COMPLETED else ("parent",):
        if not isinstance(content.get(key, 0), str | None):
            raise ValueError(f"{path}: {key} is no hash: {ADVICE}")
    return content
