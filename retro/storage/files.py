"""Files that are there whole or not at all, and folders into which one process writes at a time.

A file is written under a temporary name and renamed when it is complete, so a reader sees the old file or the new
one and nothing between. Nothing is pickled: weights are safetensors, everything else is JSON, raw numpy or FAISS.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from retro import parallel
from retro.errors import ArtifactError, CannotWrite, DamagedFile, FolderInUse
from retro.storage.known import known

LOCK_FILE = ".lock"
TEMPORARY = ".tmp"  # how the names of unfinished files end
BLOCK = 1 << 20  # bytes that are read at a time


def sha256_of_file(path: Path, n_bytes: int | None = None, skip_line: bool = False) -> str:
    """The sha256 in hexadecimal of a file's bytes, of the first `n_bytes`, or of all but the first line.

    It is computed once, and holds while the file is as it was then (`retro.storage.known`).
    """
    return known(path, f"sha256 of {n_bytes}, {skip_line}", lambda: _sha256_of_file(path, n_bytes, skip_line))


def _sha256_of_file(path: Path, n_bytes: int | None, skip_line: bool) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if skip_line:
            file.readline()
        while block := file.read(BLOCK if n_bytes is None else min(BLOCK, n_bytes)):
            digest.update(block)
            n_bytes = None if n_bytes is None else n_bytes - len(block)
    return digest.hexdigest()


def mapped_array(file: Path) -> np.ndarray:
    """An array of numpy's, mapped from its file. Raises `DamagedFile` for a file that is none."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy raises many kinds for a crafted header
        raise DamagedFile(file, f"is no numpy array ({error})") from None


@contextmanager
def naming_what_cannot_be_written(path: Path) -> Iterator[None]:
    """Inside, an `OSError` becomes a `CannotWrite` that names `path`."""
    try:
        yield
    except ArtifactError:
        raise  # about another file, which it names
    except OSError as error:
        raise CannotWrite(
            path, f"cannot write {path}: {error.strerror or error}. Nothing written earlier was changed"
        ) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it becomes `path`, else it is removed.

    Raises `CannotWrite` naming `path` when the disk is full or the folder is read-only; whatever was at `path`
    before is then still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with naming_what_cannot_be_written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Inside, no other command writes into `folder`; what a killed one left half-written is removed.

    The lock is the system's, so it ends with the process, however that ends. Of the processes of one command rank 0
    holds it for all. Raises `FolderInUse` naming the process
    that is writing there, `CannotWrite` where nothing can be written.
    """
    if parallel.rank():
        yield
        return
    file = folder / LOCK_FILE
    lock = FileLock(file, timeout=0)
    with naming_what_cannot_be_written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            with suppress(OSError):
                holder = file.read_text().strip()
            raise FolderInUse(folder, f"{folder} is being written by process {holder or 'unknown'}") from None
    try:
        for left in folder.glob(f".*{TEMPORARY}"):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk takes the lock, but no number
            file.write_text(f"{os.getpid()}\n")
        yield
    finally:
        with suppress(OSError):
            os.truncate(file, 0)
        lock.release()


def remove_unfinished(folder: Path, *paths: Path) -> None:
    """Delete what a killed stage left of work that was finished after all, unless a process is at it."""
    if any(path.exists() for path in paths):
        with suppress(FolderInUse), exclusive_lock(folder):
            for path in paths:
                shutil.rmtree(path, ignore_errors=True)
