"""One way of showing progress: tqdm's bars, and lines of text that do not break them."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

MOMENT = 2  # seconds, for which no bar is worth its line
SECONDS_IN_A_LOG = 30  # between two states of a bar that is written to a file


def bar(what: str, unit: str, total: int, done: int = 0, delay: float = 0) -> tqdm[Any]:
    """A bar to be updated, which begins where `done` are done already; a context manager. `delay` as for `each`."""
    seconds = 1 if sys.stderr.isatty() else SECONDS_IN_A_LOG
    return tqdm(total=total, initial=done, desc=what, unit=unit, mininterval=seconds, delay=delay)


def each(items: Iterable[Any], what: str, unit: str, total: int | None = None, delay: float = 0) -> tqdm[Any]:
    """The items, with a bar beside them; what is done before `delay` seconds have passed shows none."""
    seconds = 1 if sys.stderr.isatty() else SECONDS_IN_A_LOG
    return tqdm(items, desc=what, unit=unit, total=total, mininterval=seconds, delay=delay)


def note(text: str) -> None:
    """Print lines on standard output, above a bar if there is one; in a terminal, long ones are broken at words.

    Lines to be copied, which are indented or begin with `next:`, are left as they are.
    """
    width = terminal_width()
    tqdm.write("\n".join(_broken(line, width) for line in text.split("\n")))
    sys.stdout.flush()


def terminal_width() -> int | None:
    """Characters in a line of the terminal; None if standard output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _broken(line: str, width: int | None) -> str:
    if width is None or len(line) <= width or line.startswith((" ", "next:")):
        return line
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def aligned(
    rows: Sequence[Sequence[str]], sides: str, width: int | None = None, first: Sequence[int] = ()
) -> list[str]:
    """Lines of a table.

    * `sides` has < or > for each column, the side on which its cells begin
    * `width` is what there is of it; where that is too little, columns are left out, those of `first` in their order
    """
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown, spared = list(range(len(wide))), list(first)
    while width is not None and spared and sum(wide[c] + 2 for c in shown) - 2 > width:
        shown.remove(spared.pop(0))
    return ["  ".join(f"{row[c]:{sides[c]}{wide[c]}}" for c in shown).rstrip() for row in rows]
