"""Files that know what made them.

Every stage of the pipeline leaves an artifact: the corpus, the database, the
dataset, a checkpoint. Each one carries, or lies beside, a *manifest*: a small
JSON object with everything that shaped it. The next stage compares that
manifest with what it needs, so a model never reads a dataset that was cut into
chunks of another length.

Three rules keep earlier work safe. A file is written under a temporary name and
renamed when it is complete, so a reader sees the old file or the new one and
nothing between; a manifest comes after the files that it speaks of, and names
their hashes. One process at a time writes into a folder. And nothing is pickled:
weights are safetensors, everything else is JSON, raw numpy or FAISS. What is read
may come from anywhere, so it is checked before it is used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FORMAT_VERSION = 4  # raised when the meaning of a written file changes
MAX_NUMBER = 1 << 53  # what JSON's numbers hold exactly
LOCK_FILE = ".lock"
TEMPORARY = ".tmp"  # how the names of unfinished files end
_PACKAGES = ("torch", "transformers", "tokenizers", "faiss-cpu", "numpy")


def sha256_of_file(path: Path, n_bytes: int | None = None) -> str:
    """The sha256 of a file's bytes, or of the first `n_bytes`, in hexadecimal; read in blocks of a mebibyte."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20 if n_bytes is None else min(1 << 20, n_bytes)):
            digest.update(block)
            n_bytes = None if n_bytes is None else n_bytes - len(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """The sha256 of a JSON-safe value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages that an artifact's bytes depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


@contextmanager
def written_errors(path: Path) -> Iterator[None]:
    """Inside, an `OSError` becomes one that names `path`, which could not be written, and says what to do."""
    try:
        yield
    except OSError as error:
        if error.__cause__ is not None and str(error).startswith("cannot write"):
            raise  # a file within has said it already
        raise OSError(
            f"cannot write {path}: {error.strerror or error}. Nothing written earlier was changed; "
            "free some space or choose another --data-path, then run the same command again."
        ) from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it becomes `path`, else it is removed.

    Raises `OSError` naming `path` when the disk is full or the folder is read-only;
    whatever was at `path` before is then still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with written_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Inside, no other process writes into `folder`; what a killed one left half-written is removed.

    The lock is the system's, so it ends with the process, however that ends. Raises `BlockingIOError`
    naming the process that is writing there, `OSError` where nothing can be written.
    """
    import fcntl

    with written_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_FILE, "a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BlockingIOError(
                f"{folder} is being written by process {file.read().strip() or 'unknown'}; wait for it, or use another "
                f"--data-path (for a run: another --seed)"
            ) from None
        for left in folder.glob(f".*{TEMPORARY}"):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk takes the lock, but no name
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                file.truncate(0)


def remove_unfinished(folder: Path, *paths: Path) -> None:
    """Delete what a killed stage left of work that was finished after all, unless a process is at it."""
    if any(path.exists() for path in paths):
        with suppress(BlockingIOError), only_writer(folder):
            for path in paths:
                shutil.rmtree(path, ignore_errors=True)


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a hash of itself, its *seal*."""
    return value | {"seal": sha256_of_json(value)}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON-safe value, whole or not at all; with a seal, if it has a format version."""
    if isinstance(value, dict) and "format_version" in value:
        value = sealed(value)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


Fields = Mapping[str, type | tuple[Any, ...]]


def read_json(path: Path, repair: str, fields: Fields | None = None) -> dict[str, Any]:
    """Read a JSON object; `repair` is the command that makes the file anew.

    * `fields` are what the object must have: for each name `int` (0 or more), `float` (any finite number),
      `str`, `bool`, `list`, `dict`, or the values that are allowed

    Raises `FileNotFoundError` when there is none, `ValueError` when it is damaged, of another
    format version, or lacks one of the `fields`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist. Make it: {repair}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not the JSON that retro writes ({error}). Rebuild it: {repair}") from None
    return parse_json(path, text, repair, fields or {})


def parse_json(path: Path, text: str | bytes, repair: str, fields: Fields) -> dict[str, Any]:
    """As `read_json`, of a text that was found in `path`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not the JSON that retro writes ({error}). Rebuild it: {repair}") from None
    if not isinstance(value, dict) or "format_version" not in value:
        raise ValueError(f"{path} was not written by retro. Rebuild it: {repair}")
    if value["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {value['format_version']!r:.80}, but this version of retro reads "
            f"{FORMAT_VERSION}. Rebuild it: {repair}"
        )
    seal = value.pop("seal", None)
    if seal != (expected := sha256_of_json(value)):
        raise ValueError(
            f"{path} was altered after it was written: its seal is {seal!r:.80}, but its content has {expected}. "
            f"Rebuild it: {repair}"
        )
    require_fields(path, value, fields, repair)
    return value


def require_fields(path: Path, value: Mapping[str, Any], fields: Fields, repair: str) -> None:
    """Raise `ValueError` naming the first of the `fields` that `value` lacks, or that is of another kind."""
    for name, kind in fields.items():
        found = value.get(name)
        if isinstance(kind, tuple):
            fits, wanted = any(type(found) is type(k) and found == k for k in kind), " or ".join(map(repr, kind))
        elif kind is float:
            fits, wanted = type(found) in (int, float) and abs(found) < MAX_NUMBER, "a number"  # type: ignore[arg-type]
        else:
            fits = type(found) is kind and (kind is not int or 0 <= found < MAX_NUMBER)  # type: ignore[operator]
            wanted = {int: "a whole number from 0 up", str: "a text"}.get(kind, f"a {kind.__name__}")
        if not fits:
            raise ValueError(f"{path} has {name}={found!r:.80}, but {wanted} is wanted. Rebuild it: {repair}")


def differences(made_with: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One phrase for each value that an artifact was made with and that is not the one wanted."""
    return [
        f"{name}={made_with.get(name)!r}, but {name}={value!r} is wanted"
        for name, value in wanted.items()
        if made_with.get(name) != value
    ]


def require_match(path: Path, made_with: Mapping[str, Any], wanted: Mapping[str, Any], repair: str) -> None:
    """Raise `ValueError` naming both values and the repairing command if a manifest differs."""
    if different := differences(made_with, wanted):
        raise ValueError(f"{path} was made with {'; '.join(different)}. Rebuild it: {repair}")
