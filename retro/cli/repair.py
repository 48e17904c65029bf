"""From an error to a message with the command that repairs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retro.config import CorpusConfig, DatabaseConfig, DatasetConfig
from retro.errors import (
    ArtifactError,
    CannotWrite,
    DamagedFile,
    EmptyDatabase,
    FolderInUse,
    InvalidOption,
    MissingArtifact,
    NameTaken,
    SeenText,
    StaleArtifact,
    TextTooShort,
    UnfinishedUpdate,
    UntrustedPath,
)

# Fields of manifests that options of another name set.
OPTIONS = {"index_wanted": "index", "tokenizer_name": "tokenizer"}
SETTABLE = {
    *CorpusConfig.__dataclass_fields__, *DatabaseConfig.__dataclass_fields__, *DatasetConfig.__dataclass_fields__
}  # fmt: skip


def explain(error: Exception) -> str:
    """What is wrong, and what to do."""
    match error:
        case InvalidOption():
            return f"{flag(error.name, error.value)} {error.reason}"
        case FolderInUse():
            return f"{error}; wait for it, or use another --data-path (for a run: another --seed)"
        case CannotWrite():
            return f"{error}; {_after_a_full_disk(error.path)}"
        case UnfinishedUpdate():
            data = error.path.parent
            return f"{error}. Give the same command again: retro add TEXT ... (or remove NAME ...) --data-path {data}"
        case UntrustedPath():
            return f"{error}. If you trust it, name it yourself: --data-path {error.path}"
        case NameTaken():
            return f"{error}: retro remove {error.name}"
        case EmptyDatabase():
            return f"{error}: retro add TEXT"
        case TextTooShort():
            return f"{error}: --chunks-per-sample, --chunk-len"
        case SeenText():
            return f"{error}: --database DIR"
        case MissingArtifact() | StaleArtifact() | DamagedFile():
            return f"{error}. {repair_of(error)}"
    return str(error)


def flag(name: str, value: Any) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')} {value}"


def repair_of(error: ArtifactError) -> str:
    """The command that makes an artifact anew, as a sentence."""
    path, verb = error.path, "Make it" if isinstance(error, MissingArtifact) else "Rebuild it"
    if "checkpoints" in path.parts and path.name != "checkpoints":
        folder = Path(*path.parts[: path.parts.index("checkpoints") + 2])
        return f"Delete {folder} to fall back to an older checkpoint"
    if path.name == "summary.json":
        return f"{verb}: rm {path}; retro train --resume {path.parent}"
    if path.name in ("run.json", "checkpoints", "logs"):
        return f"{verb}: retro train"
    wanted = {name: pair[1] for name, pair in getattr(error, "differences", {}).items()}
    command = _command_for(path, wanted)
    if isinstance(error, StaleArtifact):
        command += ", or keep it and use another --data-path"
    return f"{verb}: {command}"


def _command_for(path: Path, wanted: dict[str, Any]) -> str:
    """The command that makes a file of a data folder."""
    if "keys" in path.parts:  # the index stays as it is, if the options are its own
        data = Path(*path.parts[: path.parts.index("keys")])
        return f"retro database --data-path {data}{_options(_of_manifest(data))}"
    if path.suffix == ".jsonl" or path.name.endswith(".jsonl"):
        return f"retro dataset --data-path {path.parent}{_options(wanted)}"
    if path.parent.name == "corpus" or path.name == "corpus":
        data = path if path.name != "corpus" and path.parent.name != "corpus" else path.parent
        data = data.parent if data.name == "corpus" else data
        return f"retro database TEXT ...{_options(wanted)} --data-path {data}"
    if path.name.startswith("retro."):
        return f"retro database TEXT ...{_options(wanted)} --data-path {path.parent}"
    return f"retro database TEXT ...{_options(wanted)} --data-path {path}"


def _options(values: dict[str, Any]) -> str:
    named = {OPTIONS.get(name, name): value for name, value in values.items()}
    if (search := named.pop("search", None)) is not None:
        named |= {"n_probe": search} if search >= 1 else {"recall": search}
    return "".join(f" {flag(name, value)}" for name, value in named.items() if name in SETTABLE)


def _of_manifest(data: Path) -> dict[str, Any]:
    """What the database in a folder was made with, as far as its manifest can be read."""
    names = ("chunk_len", "index_wanted", "embedder", "seed", "search")
    try:
        manifest = json.loads((data / "retro.index.json").read_text(encoding="utf-8"))
        return {name: manifest[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _after_a_full_disk(path: Path) -> str:
    if path.parent.name == "checkpoints":
        return f"free some space, then continue: retro train --resume {path.parent.parent}"
    return "free some space or choose another --data-path, then run the same command again"
