"""Manifests: small JSON objects that say what an artifact was made with.

Every stage of the pipeline leaves an artifact: the corpus, the database, the dataset, a checkpoint. Each one carries,
or lies beside, a manifest with everything that shaped it. The next stage compares that manifest with what it needs, so
a model never reads a dataset that was cut into chunks of another length. A manifest comes after the files that it
speaks of, and names their hashes.

What is read may come from anywhere, so it is checked before it is used: the checksum tells a torn or altered file
(not a forged one: a forger computes it anew), and the fields have to be there and of their kinds.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro.errors import DamagedFile, MissingArtifact, StaleArtifact
from retro.storage.files import atomic_write

FORMAT_VERSION = 6  # raised when the meaning of a written file changes
MAX_NUMBER = 1 << 53  # what JSON's numbers hold exactly
CHECKSUM = "checksum"  # the field that holds a hash of the others

# For each name `int` (0 or more), `float` (any finite number), `str`, `bool`, `list`, `dict`, or the values allowed.
Fields = Mapping[str, type | tuple[Any, ...]]


def sha256_of_json(value: Any) -> str:
    """The sha256 of a JSON-safe value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages that an artifact's bytes depend on; FAISS' own, whatever package it came from."""
    import faiss

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return versions | {"faiss": faiss.__version__}


def with_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a hash of itself."""
    return value | {CHECKSUM: sha256_of_json(value)}


def write_manifest(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with format version and checksum, whole or not at all."""
    value = with_checksum({"format_version": FORMAT_VERSION, **value})
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_manifest(path: Path, fields: Fields | None = None) -> dict[str, Any]:
    """Read what `write_manifest` wrote, without format version and checksum.

    * `fields` are what the object must have

    Raises `MissingArtifact` when there is none, `StaleArtifact` when it is of another format version, `DamagedFile`
    when it is anything else, or lacks one of the `fields`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingArtifact(path) from None
    except ValueError as error:
        raise DamagedFile(path, f"is not the JSON that retro writes ({error})") from None
    return parse_manifest(path, text, fields or {})


def parse_manifest(path: Path, text: str | bytes, fields: Fields) -> dict[str, Any]:
    """As `read_manifest`, of a text that was found in `path`."""
    try:
        value = json.loads(text)
        found = value.pop(CHECKSUM, None) if isinstance(value, dict) else None
        expected = sha256_of_json(value)  # which can be too deep where reading was not
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, f"is not the JSON that retro writes ({error})") from None
    if not isinstance(value, dict) or "format_version" not in value:
        raise DamagedFile(path, "was not written by retro")
    if value["format_version"] != FORMAT_VERSION:
        raise StaleArtifact(path, {"format_version": (value["format_version"], FORMAT_VERSION)})
    if found != expected:
        raise DamagedFile(
            path, f"was altered after it was written: its checksum is {found!r:.80}, but its content has {expected}"
        )
    del value["format_version"]
    require_fields(path, value, fields)
    return value


def is_manifest(path: Path) -> bool:
    """Whether retro wrote the JSON at `path`, in whatever version; not whether it is whole."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and {"format_version", CHECKSUM} <= value.keys()


def require_fields(path: Path, value: Mapping[str, Any], fields: Fields) -> None:
    """Raise `DamagedFile` naming the first of the `fields` that `value` lacks, or that is of another kind.

    (A library of schemas would want a class for each manifest, which is more to read than this function.)
    """
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
            raise DamagedFile(path, f"has {name}={found!r:.80}, but {wanted} is wanted")


def require_positive(path: Path, value: Mapping[str, Any], *names: str) -> None:
    """Raise `DamagedFile` naming the first of these whole numbers that is 0."""
    for name in names:
        if value[name] < 1:
            raise DamagedFile(path, f"has {name}={value[name]}, but at least 1 is wanted")
