"""One way of showing progress: tqdm's bars, and lines of text that do not break them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

MOMENT = 2  # seconds, for which no bar is worth its line
SECONDS_IN_A_LOG = 30  # between two states of a bar that is written to a file


def bar(what: str, unit: str, total: int, done: int = 0) -> tqdm[Any]:
    """A bar to be updated, which begins where `done` are done already; a context manager."""
    seconds = 1 if sys.stderr.isatty() else SECONDS_IN_A_LOG
    return tqdm(total=total, initial=done, desc=what, unit=unit, mininterval=seconds)


def each(items: Iterable[Any], what: str, unit: str, total: int | None = None, delay: float = 0) -> tqdm[Any]:
    """The items, with a bar beside them; what is done before `delay` seconds have passed shows none."""
    seconds = 1 if sys.stderr.isatty() else SECONDS_IN_A_LOG
    return tqdm(items, desc=what, unit=unit, total=total, mininterval=seconds, delay=delay)


def note(text: str) -> None:
    """Print a line on standard output, above a bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()
