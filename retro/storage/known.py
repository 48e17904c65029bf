"""What was found out once by reading a whole file, and holds while the file is as it was then.

Hashing gigabytes whenever a process starts takes longer than what it starts for. So the hash of a large file is kept
in the user's cache folder (`$XDG_CACHE_HOME/retro`, or `~/.cache/retro`), and holds while size, times and place on the
disk are the same. `retro verify` reads everything again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value", str, int)
LARGE = 1 << 20  # bytes; what is smaller is read in less time than it is looked up
# Nanoseconds since a file was written, before which nothing is kept: it could be written again in a tick of the clock.
SETTLED = 2_000_000_000
_reads_all: ContextVar[bool] = ContextVar("_reads_all", default=False)


@contextmanager
def reading_all() -> Iterator[None]:
    """Inside, whatever is asked for is found out anew."""
    token = _reads_all.set(True)
    try:
        yield
    finally:
        _reads_all.reset(token)


def known(path: Path, what: str, find_out: Callable[[], Value]) -> Value:
    """What `find_out()` gives of a file, or gave of it before."""
    before = _stamp(path)
    if before["bytes"] < LARGE:
        return find_out()
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    entry = _cache() / name[:2] / f"{name}.json"
    values = _read(entry, before)
    if what in values and not _reads_all.get():
        return values[what]  # type: ignore[return-value]
    value = find_out()
    if _stamp(path) == before and time.time_ns() - max(before["modified"], before["changed"]) > SETTLED:
        _write(entry, before, values | {what: value})
    return value


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "retro"


def _stamp(path: Path) -> dict[str, int]:
    """What changes when a file does; the time when its entry changed is none that a program sets."""
    of = os.stat(path)
    times = {"modified": of.st_mtime_ns, "changed": of.st_ctime_ns}
    return {"bytes": of.st_size, **times, "disk": of.st_dev, "place": of.st_ino}


def _read(entry: Path, stamp: dict[str, int]) -> dict[str, str | int]:
    try:
        found = json.loads(entry.read_text(encoding="utf-8"))
        return dict(found["values"]) if found["stamp"] == stamp else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # it was never found out, or nobody can tell any more


def _write(entry: Path, stamp: dict[str, int], values: dict[str, str | int]) -> None:
    temporary = entry.with_name(f".{entry.name}.{os.getpid()}")
    with suppress(OSError):  # without it, it is found out again
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"stamp": stamp, "values": values}), encoding="utf-8")
        os.replace(temporary, entry)
