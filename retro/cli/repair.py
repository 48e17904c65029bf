"""From an error to a message with the command that repairs it, to be pasted as it stands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro.config import BERT, OVERLAP, CorpusConfig, DatabaseConfig, DatasetConfig, retriever_parts
from retro.errors import (
    ArtifactError,
    CannotWrite,
    DamagedFile,
    EmptyDatabase,
    FolderInUse,
    InvalidOption,
    MissingArtifact,
    MissingDataOfRun,
    NameTaken,
    SeenText,
    StaleArtifact,
    TextTooShort,
    UnfinishedUpdate,
    UntrustedPath,
)

# Fields of manifests that options of another name set, and the options that each command has.
OPTIONS = {"index_wanted": "index", "tokenizer_name": "tokenizer", "n_train_wanted": "n_train"}
SETTABLE = {
    "database": {*CorpusConfig.__dataclass_fields__, *DatabaseConfig.__dataclass_fields__},
    "dataset": {*DatasetConfig.__dataclass_fields__},
}
OF_DATABASE = (
    "chunk_len", "retriever", "rerank", "rerank_by", "index_wanted", "embedder", "key_bits", "seed", "search",
    "n_train_wanted",
)  # fmt: skip


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
            return f"{error}. If you trust it, name it yourself: --data-path {_quoted(error.path)}"
        case MissingDataOfRun():
            return f"{error}: --data-path DIR"
        case NameTaken():
            return f"{error}: retro remove {_quoted(error.name)} --data-path DIR"
        case EmptyDatabase():
            return f"{error}: retro add TEXT"
        case TextTooShort():
            return f"{error}: --chunks-per-sample, --chunk-len"
        case SeenText():
            return str(error)
        case MissingArtifact() | StaleArtifact() | DamagedFile():
            return f"{error}. {repair_of(error)}"
    return str(error)


def flag(name: str, value: Any) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')} {_quoted(value)}"


def _quoted(value: Any) -> str:
    return shlex.quote(str(value))


def repair_of(error: ArtifactError) -> str:
    """The command that makes an artifact anew, as a sentence."""
    path, verb = error.path, "Make it" if isinstance(error, MissingArtifact) else "Rebuild it"
    wanted = getattr(error, "wanted", {})
    checkpoint = path if path.name.isdigit() else path.parent
    if checkpoint.name.isdigit() and checkpoint.parent.name == "checkpoints":
        run, aside = checkpoint.parents[1], checkpoint.with_name(f"{checkpoint.name}.damaged")
        if path == checkpoint and isinstance(error, MissingArtifact):
            return f"{verb}:{_train(run / 'run.json')}"
        return f"Set it aside to fall back to an older checkpoint: mv {_quoted(checkpoint)} {_quoted(aside)}"
    if path.suffix == ".safetensors" or path.name == "config.json":
        return "Save the model again"
    if path.name == "summary.json":
        return f"{verb}: rm {_quoted(path)}; retro train --resume {_quoted(path.parent)}"
    if path.name == "run.json" and isinstance(error, StaleArtifact) and "format_version" not in error.differences:
        return f"Name the folder of the data that it was made with, --data-path DIR, or train anew:{_train(path)}"
    if path.name in ("run.json", "checkpoints", "logs"):
        return f"{verb}:{_train(path)}"
    command = _command_for(path, wanted)
    if isinstance(error, StaleArtifact):
        command += ", or keep it and use another --data-path"
    return f"{verb}: {command}"


def _train(path: Path) -> str:
    """The command that trains a run like the one that a file belongs to."""
    return " retro train" + " --no-retrieval" * path.parent.parent.name.endswith("_no_retrieval")


def _command_for(path: Path, wanted: Mapping[str, Any]) -> str:
    """The command that makes a file of a data folder."""
    for folder in path.parents[:2]:
        if folder.name == "retriever" and (folder.parent / "retro.index.json").exists():  # what is no FAISS index
            return _same_database(folder.parent)
        if folder.suffix == ".arrays":  # of samples
            return f"retro dataset{_options(wanted, 'dataset')}{_data(folder.parent)}"
    if path.suffix == ".npy" or path.parent.name == "keys":  # a shard of keys, or their folder
        return _same_database(path.parents[2] if path.suffix == ".npy" else path.parents[1])
    if path.name in ("retro.index", "retro.ivfdata", "index.shards"):
        return _same_database(path.parent)
    if path.suffix in (".jsonl", ".shards"):
        return f"retro dataset{_options(wanted, 'dataset')}{_data(path.parent)}"
    if path.parent.name == "corpus" or path.name == "corpus":
        data = path.parent if path.name == "corpus" else path.parents[1]
        return f"retro database TEXT ...{_options(wanted)}{_data(data)}"
    if path.name == "retro.index.json":
        return f"retro database TEXT ...{_options(wanted or _of_manifest(path.parent))}{_data(path.parent)}"
    return f"retro database TEXT ...{_options(wanted)}{_data(path)}"


def _same_database(data: Path) -> str:
    """The command that makes what is damaged of a database, of the text that is there, and leaves the rest."""
    return f"retro database{_options(_of_manifest(data))}{_data(data)}"


def _data(path: Path) -> str:
    return f" --data-path {_quoted(path)}"


def _options(values: Mapping[str, Any], command: str = "database") -> str:
    """The values of manifests that a command has options for, as such."""
    named = {OPTIONS.get(name, name): value for name, value in values.items()}
    if (search := named.pop("search", None)) is not None:
        named |= {"n_probe": search} if search >= 1 else {"recall": search}
    if ":" in (tokenizer := str(named.get("tokenizer", ""))) and not tokenizer.startswith("bpe:"):
        named["tokenizer"] = "FOLDER"  # of which a manifest has only name and hash
    options = {name: value for name, value in named.items() if name in SETTABLE[command] and value not in (None, False)}
    return "".join(f" {flag(name, value)}".removesuffix(" True") for name, value in options.items())


def _of_manifest(data: Path) -> dict[str, Any]:
    """What the database in a folder was made with, as far as its manifest can be read."""
    try:
        manifest = json.loads((data / "retro.index.json").read_text(encoding="utf-8"))
        made = {name: manifest[name] for name in OF_DATABASE if name in manifest}
        embeds, _ = retriever_parts(made.get("retriever", BERT))
        # What there is no choice of, or what is the default.
        skipped = ["retriever"] * (made.get("retriever", BERT) == BERT) + ["rerank"] * (not made.get("rerank"))
        skipped += ["rerank_by"] * (made.get("rerank_by") == OVERLAP) + ["key_bits"] * (made.get("key_bits") == 32)
        skipped += ["embedder"] * (embeds != BERT) + ["index_wanted", "search", "n_train_wanted"] * (embeds is None)
        return {name: value for name, value in made.items() if name not in skipped}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _after_a_full_disk(path: Path) -> str:
    if path.parent.name == "checkpoints":
        return f"free some space, then continue: retro train --resume {_quoted(path.parent.parent)}"
    return "free some space or choose another --data-path, then run the same command again"
