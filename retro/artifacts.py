"""Files that know what made them.

Every stage of the pipeline leaves an artifact: the corpus, the database, the
dataset, a checkpoint. Each one carries, or lies beside, a *manifest*: a small
JSON object with everything that shaped it. The next stage compares that
manifest with what it needs, so a model never reads a dataset that was cut into
chunks of another length.

Two rules keep earlier work safe. A file is written under a temporary name and
renamed when it is complete, so a reader sees the old file or the new one and
nothing between. And nothing is pickled: weights are safetensors, everything else
is JSON, raw numpy or FAISS.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT_VERSION = 2  # raised when the meaning of a written file changes
_PACKAGES = ("torch", "transformers", "tokenizers", "faiss-cpu", "numpy")


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal; read in blocks of a mebibyte."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """The sha256 of a JSON-safe value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages that an artifact's bytes depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it becomes `path`, else it is removed.

    Raises `OSError` naming `path` when the disk is full or the folder is read-only;
    whatever was at `path` before is then still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"cannot write {path}: {reason}. Nothing written earlier was changed; "
            "free some space or choose another --data-path, then run the same command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON-safe value, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, repair: str) -> dict[str, Any]:
    """Read a JSON object; `repair` is the command that makes the file anew.

    Raises `FileNotFoundError` when there is none, `ValueError` when it is damaged or of another
    format version.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist. Make it: {repair}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not the JSON that retro writes ({error}). Rebuild it: {repair}") from None
    if not isinstance(value, dict) or "format_version" not in value:
        raise ValueError(f"{path} was not written by retro. Rebuild it: {repair}")
    if value["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {value['format_version']}, but this version of retro reads "
            f"{FORMAT_VERSION}. Rebuild it: {repair}"
        )
    return value


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
