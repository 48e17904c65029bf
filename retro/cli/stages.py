"""Corpus, database and dataset, found or built.

A stage builds its artifact if it is not there, or is damaged, or (with `rebuild`) was made with other options, and
leaves it alone if it is what the options ask for. Without `rebuild`, what was made otherwise is refused, not replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from retro import parallel
from retro.cli.presets import texts_of
from retro.config import BERT, CorpusConfig, DatabaseConfig, DatasetConfig
from retro.errors import ArtifactError, DamagedFile, MissingArtifact, StaleArtifact, require_match
from retro.progress import note
from retro.storage.files import remove_unfinished

if TYPE_CHECKING:
    from retro.text.corpus import Corpus
    from retro.text.split import Found

T = TypeVar("T")
N_NAMED = 5  # documents that an error names of each kind; the others are counted


def is_current(
    path: Path, read: Callable[[Path], Mapping[str, Any]], cache_key: Mapping[str, Any], rebuild: bool
) -> bool:
    """Whether the artifact at `path` is there and was made with these options. Raises if not, unless `rebuild`."""
    try:
        require_match(path, read(path), cache_key)
    except MissingArtifact:
        return False
    except (StaleArtifact, DamagedFile):
        if not rebuild:
            raise
        return False
    return True


def whole(read: Callable[[], T]) -> T | None:
    """What `read` gives; None if that is damaged, which is said, because it is made again."""
    try:
        return read()
    except ArtifactError as error:
        note(f"made again: {error}")
        return None


def with_names_of_texts(error: StaleArtifact, documents: Found) -> StaleArtifact:
    """A corpus' error with the names of the documents that are new, gone or changed, for the hashes of all texts."""
    from retro.text.corpus import Corpus

    if "texts_sha256" not in error.differences:
        return error
    corpus = Corpus.load(error.path.parent)
    built_of = corpus.documents[: corpus.split("valid").stop]  # and not what was added later
    # Of a single text there are the hashes of its two parts; if it is still there, it has changed.
    before = {d.name.removesuffix(" [train]").removesuffix(" [valid]"): d.sha256 for d in built_of}
    now = {name: sha256 for name, sha256, _ in documents}
    before |= {name: now.get(name, "") for name, _ in corpus.manifest["left_out"]}  # whose hashes are not kept
    changes = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
        "changed": [name for name in now if before.get(name, now[name]) != now[name]],
    }
    said = [
        f"{len(names):,} {what} ({', '.join(names[:N_NAMED])}{', ...' if len(names) > N_NAMED else ''})"
        for what, names in changes.items()
        if names
    ]
    different = {name: pair for name, pair in error.differences.items() if name != "texts_sha256"}
    return StaleArtifact(error.path, different, error.wanted, f"other texts: {', '.join(said)}") if said else error


def prepare_corpus(config: CorpusConfig, preset: str, texts: Sequence[str], data_path: Path, rebuild: bool) -> Corpus:
    """The corpus of `texts` (the preset's own if empty): found, or built."""
    from retro.storage.manifests import read_manifest
    from retro.text.build import build_corpus, corpus_cache_key, unfinished
    from retro.text.corpus import CORPUS_FOLDER, MANIFEST_FILE, Corpus
    from retro.text.documents import search_texts
    from retro.text.records import Columns
    from retro.text.split import list_documents, texts_sha256

    folder, corpus = data_path / CORPUS_FOLDER, None

    def paths() -> list[Path]:
        """The texts, downloaded if they have to be; for rank 0 to ask."""
        return [Path(text) for text in texts] or texts_of(preset, data_path)

    def found() -> bool:
        nonlocal corpus
        found_texts, passed_over = search_texts(paths())
        if str(passed_over):
            note(f"passed over: {passed_over}")
        if not (folder / MANIFEST_FILE).exists():
            return False  # they are read when it is built
        documents = list_documents(found_texts, Columns(config.text_column, config.name_column))
        cache_key = corpus_cache_key(texts_sha256(documents), config)
        path, reason = folder / MANIFEST_FILE, ""
        try:
            # Corpora that were built before there was a choice do not say that they hold out documents.
            current = is_current(path, lambda p: {"hold_out": "documents"} | read_manifest(p), cache_key, rebuild)
        except StaleArtifact as error:
            raise with_names_of_texts(error, documents) from None
        try:
            corpus = Corpus.load(folder) if current else None
        except ArtifactError as error:
            reason = f"{error}. "
        changed = whole(lambda: read_manifest(path)) if corpus is None and path.exists() else None
        if changed and (changed.get("additions") or changed.get("removed")):
            raise ValueError(
                f"{reason}Documents were added to {folder} and removed since it was built, which building it of these "
                f"texts alone would lose. To do that, delete {folder}; then repeat retro add and retro remove"
            )
        if reason:
            note(f"made again: {reason}")
        return corpus is not None

    if not parallel.broadcast_from_rank_zero(found):
        name = None if texts else f"retro_{preset}"
        parallel.on_rank_zero(lambda: build_corpus(paths(), folder, name=name, **asdict(config)))
        corpus = Corpus.load(folder)
        describe_corpus(corpus)
    else:
        parallel.on_rank_zero(lambda: remove_unfinished(folder, *unfinished(folder)))
    return corpus or Corpus.load(folder)


def describe_corpus(corpus: Corpus) -> None:
    """Say how large a corpus is, what is held out, and what is left out because it is near to that."""
    held_out, left_out = corpus.split("valid"), corpus.manifest["left_out"]
    valid = ", ".join(corpus.documents[i].name for i in list(held_out)[:4])
    note(
        f"corpus: {len(corpus.documents):,} documents, {len(corpus.tokens):,} tokens of {corpus.n_tokens:,} kinds; "
        f"held out: {valid or 'nothing'}{' ...' if len(held_out) > 4 else ''}"
    )
    if left_out:
        named = ", ".join(f"{name} (near {near})" for name, near in left_out[:4])
        note(
            f"left out: {len(left_out):,} near-duplicates of held-out documents: {named}"
            f"{' ...' if len(left_out) > 4 else ''}; --keep-near-held-out trains on them all the same"
        )
    if corpus.is_one_text:
        note(
            "note: there is one text, and its end is held out. What is held out retrieves from its own beginning, "
            "which no text of another author would have; more documents make it a fair test"
        )


def prepare_database(
    config: DatabaseConfig, corpus: Corpus, data_path: Path, device: Any, rebuild: bool
) -> dict[str, Any]:
    """The database's manifest: found, or built. Keys that are damaged are made again, and the index stays."""
    from retro.database import build_database
    from retro.search.building import SHARDS_FOLDER, database_cache_key, embedder_of, files_beside
    from retro.search.index_file import MANIFEST_FILE, finish_writing, read_database_manifest, read_index
    from retro.search.keys import Keys
    from retro.search.querying import holds_keys

    path, cache_key = data_path / MANIFEST_FILE, database_cache_key(corpus, config)
    embeds, needs_keys = config.parts[0] is not None, False

    def found() -> bool:
        nonlocal needs_keys
        if not is_current(path, lambda _: read_database_manifest(data_path), cache_key, rebuild):
            return False
        manifest = read_database_manifest(data_path)
        files = files_beside(data_path, corpus, manifest)
        if files is not None and whole(files.open) is None:
            return False
        if not embeds:
            return True
        if (index := whole(lambda: read_index(data_path, manifest))) is None:
            return False
        keys = Keys(data_path, corpus, manifest["chunk_len"], manifest)
        needs_keys = not holds_keys(index) and not whole(keys.is_whole)
        return True

    if not parallel.broadcast_from_rank_zero(found):
        manifest = build_database(config=config, corpus=corpus, data_path=data_path, device=device)
    else:
        manifest = read_database_manifest(data_path)
        if embeds:
            keys = Keys(data_path, corpus, manifest["chunk_len"], manifest)
            if parallel.broadcast_from_rank_zero(lambda: needs_keys):
                keys.compute_alone(embedder_of(keys, manifest, device))
            parallel.on_rank_zero(lambda: finish_writing(data_path))
            parallel.on_rank_zero(lambda: remove_unfinished(data_path, data_path / SHARDS_FOLDER, *keys.others))
    if manifest["note"]:
        note(f"note: {manifest['note']}")
    note(f"database: {describe(manifest)}")
    return manifest


def describe(database: dict[str, Any]) -> str:
    """A database's manifest in a line: how many chunks, in which index, with which recall."""
    from retro.storage.sample_file import retriever_of

    recall = ", ".join(f"{share:.1%} {k}" for k, share in database["recall"].items()) or "not known"
    if database["recall"] and database["n_changed"]:
        recall += f" before {database['n_changed']:,} of its chunks came or went"
    by = f", retrieved by {how}" if (how := retriever_of(database)) not in (BERT, database["index"]) else ""
    return (
        f"{database['n_chunks']:,} chunks of {database['chunk_len']} tokens in {database['index']}{by}; recall {recall}"
    )


def prepare_dataset(
    config: DatasetConfig, corpus: Corpus, database: dict[str, Any], data_path: Path, device: Any, rebuild: bool
) -> dict[str, int]:
    """Counts of the training dataset, found or built."""
    from retro.dataset import DATASET_FILE, Dataset, build_dataset, what_to_exclude
    from retro.evaluation.audit import audit
    from retro.storage.sample_file import dataset_cache_key, read_header, remove_others

    cache_key = dataset_cache_key(database, corpus, config, what_to_exclude(corpus, config))
    paths = [data_path / name for name in DATASET_FILE.values()]

    def found() -> bool:
        current = [is_current(path, read_header, cache_key, rebuild) for path in paths]
        return all(current) and whole(lambda: [Dataset(path, corpus) for path in paths]) is not None

    if not parallel.broadcast_from_rank_zero(found):
        build_dataset(config=config, corpus=corpus, data_path=data_path, device=device)
    else:
        parallel.on_rank_zero(lambda: [*map(remove_others, paths)])
    dataset = Dataset(paths[0], corpus)
    counts, n_tokens = audit(dataset), corpus.n_train_tokens
    note(
        f"dataset: {counts['samples']:,} samples predict {dataset.header['n_targets'] / n_tokens:.1%} of {n_tokens:,} "
        f"tokens; {counts['chunks']:,} chunks with {counts['neighbors']:,} neighbors (exclude={cache_key['exclude']})"
    )
    note(f"audit: {describe_audit(counts)}")
    return counts


def describe_audit(counts: Mapping[str, int]) -> str:
    """The counts of an audit in a sentence."""
    return (
        f"{counts['leaking_neighbors']:,} neighbors overlap text still to be predicted; {counts['copied_from_own']:,} "
        "chunks find 8 of their next tokens in a row in a neighbor of their own document or a near-duplicate, "
        f"{counts['copied_from_elsewhere']:,} in one from elsewhere"
    )
