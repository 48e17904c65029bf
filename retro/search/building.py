"""A database from its keys: the index filled, measured and written with its manifest; and opened again."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import faiss

from retro import parallel
from retro.bert_embeddings import BERTChunkEmbeddings
from retro.config import DatabaseConfig
from retro.errors import EmptyDatabase, UnfinishedUpdate, require_match
from retro.search.factory import KEYS_PER_LIST, choose_index, fall_back_to_flat, n_lists_of, set_n_probe
from retro.search.filling import fill_index
from retro.search.index_file import MANIFEST_FILE, read_database_manifest, read_index, write_database
from retro.search.keys import Keys
from retro.search.recall import ExactNeighbors, choose_n_probe
from retro.search.trial import require_working_index
from retro.storage.files import exclusive_lock
from retro.storage.manifests import package_versions
from retro.text.corpus import Corpus

SHARDS_FOLDER = "index.shards"  # of an unfinished index


def build_from_keys(keys: Keys, bert: BERTChunkEmbeddings, config: DatabaseConfig, data_path: Path) -> dict[str, Any]:
    """Compute the keys that are missing, build the index over all of them, and write it; returns the manifest.

    An interrupted build continues after the last shard. Until the new index is whole, the old one stays. Raises
    `InvalidOption`, before anything is embedded, for an index that does not work.
    """
    n_chunks = int(keys.in_database.sum())
    if not n_chunks:
        raise EmptyDatabase("every document was removed from the database; add one first")
    factory, n_train = config.factory, config.n_train
    if factory == "auto":
        factory = choose_index(n_chunks, bert.d_emb)
        n_train = max(n_train, KEYS_PER_LIST * n_lists_of(factory))
    parallel.on_rank_zero(partial(require_working_index, factory, bert.d_emb))
    n_train = min(n_train, n_chunks)
    factory, note = fall_back_to_flat(factory, bert.d_emb, n_train)
    with exclusive_lock(data_path):
        keys.compute(bert, config.embed_batch_size)
        index = fill_index(factory, keys, n_train, config.seed, data_path / SHARDS_FOLDER)
        if index is not None:  # on rank 0
            exact, remark, n_probe = ExactNeighbors.of(keys, bert, config.seed), "", config.n_probe
            if n_probe is None:
                n_probe, remark = choose_n_probe(index, keys, exact, config.recall)
            set_n_probe(index, n_probe)
            manifest = {
                **database_cache_key(keys.corpus, config),
                **documents_in_database(keys.corpus),
                "index": factory,
                "note": "; ".join(filter(None, (note, remark))),
                "n_chunks": n_chunks,
                "n_probe": n_probe,
                "n_train": n_train,
                **bert.manifest,
                "recall": exact.recall(index, keys),
                "versions": package_versions(),
            }
            write_database(index, data_path, manifest)
            for folder in (data_path / SHARDS_FOLDER, *keys.others):
                shutil.rmtree(folder, ignore_errors=True)
        parallel.wait_for_everyone()
    return read_database_manifest(data_path)


def database_cache_key(corpus: Corpus, config: DatabaseConfig) -> dict[str, Any]:
    """The part of a database's manifest that tells whether it has to be built again."""
    return {
        "chunk_len": config.chunk_len,
        "index_wanted": config.factory,
        "search": config.search,
        "n_train_wanted": config.n_train,
        "embedder": config.embedder,
        "seed": config.seed,
        "corpus_sha256": corpus.sha256,
        "database_sha256": corpus.database_sha256,
    }


def documents_in_database(corpus: Corpus) -> dict[str, Any]:
    """The part of a database's manifest that tells which documents were added and removed since it was built."""
    return {
        "database_sha256": corpus.database_sha256,
        "additions": list(corpus.additions),
        "removed": {str(number): corpus.documents[number].name for number in sorted(corpus.removed)},
    }


def config_of_database(manifest: dict[str, Any]) -> DatabaseConfig:
    """The config that builds a database like this one."""
    search = manifest["search"]
    return DatabaseConfig(
        chunk_len=manifest["chunk_len"],
        embedder=manifest["embedder"],
        index=manifest["index_wanted"],
        n_probe=int(search) if search >= 1 else None,
        recall=search if search < 1 else DatabaseConfig.recall,
        n_train=manifest["n_train_wanted"],
        seed=manifest["seed"],
    )


def open_database(
    data_path: Path, corpus: Corpus, chunk_len: int | None = None
) -> tuple[faiss.Index, Keys, dict[str, Any]]:
    """Index, keys and manifest of the database in a folder.

    Raises `MissingArtifact`, `DamagedFile` or, when it is of another text or `chunk_len`, `StaleArtifact`;
    `UnfinishedUpdate` when documents came or went and the index does not know yet.
    """
    path, manifest = data_path / MANIFEST_FILE, read_database_manifest(data_path)
    wanted: dict[str, Any] = {"corpus_sha256": corpus.sha256}
    require_match(path, manifest, wanted | ({} if chunk_len is None else {"chunk_len": chunk_len}))
    found, now = manifest["database_sha256"], corpus.database_sha256
    if found != now:
        raise UnfinishedUpdate(
            path,
            f"{path} has database_sha256={found[:12]}, but the corpus has {now[:12]}: documents were added or removed, "
            "and the index does not follow yet",
        )
    return read_index(data_path, manifest), Keys(data_path, corpus, manifest["chunk_len"], manifest), manifest


def embedder_of(
    keys: Keys, manifest: dict[str, Any], device: Any, bert: BERTChunkEmbeddings | None = None
) -> BERTChunkEmbeddings:
    """The BERT that a database's keys are of. Raises `StaleArtifact` if that is not `bert`, or not found any more."""
    bert = bert or BERTChunkEmbeddings(device, manifest["embedder"], manifest["trim"], manifest["precision"])
    wanted = {name: bert.manifest[name] for name in keys.embedder}
    require_match(keys.data_path / MANIFEST_FILE, keys.embedder, wanted)
    return bert
