"""One progress bar for a run, and log lines that do not tear it."""

import contextlib
import sys
from collections.abc import Iterator

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


def drawing_bar(samples: int, shown: bool) -> "tqdm[None]":
    """A bar over the samples of a collection, below that of the run, which is gone when it is closed."""
    hidden = not (shown and sys.stderr.isatty())
    return tqdm(total=samples, disable=hidden, unit="sample", dynamic_ncols=True, leave=False, desc="drawing")


@contextlib.contextmanager
def progress_bar(iteration: int, train_iters: int, shown: bool) -> Iterator["tqdm[None]"]:
    """A bar over the iterations of a run. Quiet where `shown` is False and where stderr is not a terminal."""
    hidden = not (shown and sys.stderr.isatty())
    redirect = contextlib.nullcontext() if hidden else logging_redirect_tqdm()
    bar = tqdm(total=train_iters, initial=iteration, disable=hidden, unit="step", dynamic_ncols=True)
    with redirect, bar:
        yield bar
