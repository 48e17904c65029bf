"""A database from its keys: the index filled, measured and written with its manifest; and opened again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from retro import parallel
from retro.config import BERT, OVERLAP, DatabaseConfig, retriever_parts, with_given
from retro.errors import EmptyDatabase, InvalidOption, UnfinishedUpdate, require_match
from retro.search.factory import KEYS_PER_LIST, choose_index, fall_back_to_flat, n_lists_of, set_n_probe
from retro.search.filling import fill_index
from retro.search.index_file import MANIFEST_FILE, read_database_manifest, read_index, write_database
from retro.search.keys import Keys
from retro.search.recall import ExactNeighbors, choose_n_probe
from retro.search.retrievers import Dense, Files, Finds, Judge, Merged, Reranked, Retriever, common_runs_of, shipped
from retro.search.sentences import CrossEncoded, Embedder, load_embedder
from retro.search.trial import require_working_index
from retro.storage.files import exclusive_lock
from retro.storage.manifests import package_versions, sha256_of_json, write_manifest
from retro.text.corpus import Corpus

SHARDS_FOLDER = "index.shards"  # of an unfinished index


def build(
    corpus: Corpus,
    config: DatabaseConfig,
    data_path: Path,
    embedder: Embedder | None,
    d_emb: int | None,
    retriever: Retriever | None,
    device: Any,
) -> dict[str, Any]:
    """Build what finds the chunks of a corpus' database; returns the manifest.

    * `embedder` embeds them for a FAISS index, `retriever` finds them otherwise, in its place or beside it; left out,
      they are what the config says
    * `d_emb` is how many features an embedding should have, if not the embedder's
    """
    embeds, other = config.parts
    if embeds is None:
        embedder = None
    else:
        embedder = embedder or load_embedder(embeds, config.embedder, device, corpus.tokenizer.kind == "char")
        if d_emb is not None and d_emb != embedder.d_emb:
            raise ValueError(
                f"d_emb={d_emb}, but {embedder.embedder} gives embeddings of {embedder.d_emb} features; leave d_emb out"
            )
        if embeds == BERT:
            config = with_given(config, {"embedder": embedder.embedder})
    if retriever is None and other is not None:
        retriever = shipped(other)
    files = None if retriever is None else Files(retriever, data_path, corpus, config.chunk_len)
    if files is not None:
        with exclusive_lock(data_path):
            files.build()
    if embedder is not None:
        keys = Keys(data_path, corpus, config.chunk_len, {**embedder.manifest, "key_bits": config.key_bits})
        manifest = build_from_keys(keys, embedder, config, data_path)
    else:
        assert files is not None
        with exclusive_lock(data_path):
            made = database_cache_key(corpus, config) | without_index(files)
            parallel.on_rank_zero(lambda: write_manifest(data_path / MANIFEST_FILE, made))
            parallel.wait_for_everyone()
        manifest = read_database_manifest(data_path)
    if files is not None:
        with exclusive_lock(data_path):
            parallel.on_rank_zero(files.remove_others)
    return manifest


def without_index(files: Files) -> dict[str, Any]:
    """What stands in the manifest of a database that has no FAISS index, of its documents and in the place of one."""
    recall = getattr(files.retriever, "recall", None)
    return {
        **documents_in_database(files.chunks.corpus),
        "index": files.retriever.name,
        "note": "",
        "n_chunks": len(files.chunks),
        "n_probe": 1,
        "n_train": 0,
        "d_emb": 1,
        "trim": False,
        "precision": "fp32",
        "embedder_sha256": "",
        "index_sha256": sha256_of_json(files.manifest),
        "lists_sha256": "",
        "recall": {} if recall is None else dict.fromkeys(("@1", "@2", "@10"), recall),
        "versions": package_versions(),
    }


def build_from_keys(keys: Keys, bert: Embedder, config: DatabaseConfig, data_path: Path) -> dict[str, Any]:
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
    embeds, _ = config.parts
    of_index = {"index_wanted": config.factory, "search": config.search, "n_train_wanted": config.n_train}
    return {
        "chunk_len": config.chunk_len,
        "retriever": config.retriever,
        "rerank": config.rerank,
        "rerank_by": config.rerank_by,
        "rerank_sha256": "" if config.rerank_by == OVERLAP else CrossEncoded("cpu", config.rerank_by).sha256,
        "embedder": config.embedder if embeds == BERT else embeds or "",
        "key_bits": config.key_bits,
        **(of_index if embeds else {"index_wanted": "", "search": 1, "n_train_wanted": 0}),
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
        retriever=manifest["retriever"],
        rerank=manifest["rerank"],
        rerank_by=manifest["rerank_by"],
        embedder=manifest["embedder"],
        key_bits=manifest["key_bits"],
        index=manifest["index_wanted"],
        n_probe=int(search) if search >= 1 else None,
        recall=search if search < 1 else DatabaseConfig.recall,
        n_train=manifest["n_train_wanted"],
        seed=manifest["seed"],
    )


def open_manifest(data_path: Path, corpus: Corpus, chunk_len: int | None = None) -> dict[str, Any]:
    """The manifest of the database in a folder.

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
    return manifest


def files_beside(
    data_path: Path, corpus: Corpus, manifest: Mapping[str, Any], retriever: Retriever | None = None
) -> Files | None:
    """What a database has in the place of its FAISS index, or beside it; None for nothing.

    * `retriever` is one of someone's own. Raises `InvalidOption` if it is not the database's
    """
    _, name = retriever_parts(manifest["retriever"])
    if retriever is not None and retriever.name != name:
        raise InvalidOption("retriever", retriever.name, f"is not the database's, {name or BERT}")
    if name is None:
        return None
    return Files(retriever or shipped(name), data_path, corpus, manifest["chunk_len"])


def open_retriever(
    data_path: Path,
    corpus: Corpus,
    manifest: Mapping[str, Any],
    n_probe: int,
    device: Any,
    embedder: Embedder | None,
    retriever: Retriever | None,
) -> tuple[Finds, Dense | None]:
    """What finds the chunks of a database, and what of it does so by keys, if anything."""
    files = files_beside(data_path, corpus, manifest, retriever)
    other, dense = files.open() if files is not None else None, None
    if retriever_parts(manifest["retriever"])[0]:
        keys, index = Keys(data_path, corpus, manifest["chunk_len"], manifest), read_index(data_path, manifest)
        set_n_probe(index, n_probe)
        dense = Dense(index, keys, embedder_of(keys, manifest, device, embedder))
    finds: Any = Merged(dense, other) if dense and other else dense or other
    if manifest["rerank"]:
        finds = Reranked(
            finds, manifest["rerank"], judge_of(data_path, manifest, device), corpus, manifest["chunk_len"]
        )
    return finds, dense


def judge_of(data_path: Path, manifest: Mapping[str, Any], device: Any) -> Judge:
    """What ranks a database's neighbors again. Raises `StaleArtifact` if a model is not the one that it was."""
    if manifest["rerank_by"] == OVERLAP:
        return common_runs_of
    judge = CrossEncoded(device, manifest["rerank_by"])
    require_match(data_path / MANIFEST_FILE, manifest, {"rerank_sha256": judge.sha256})
    return judge


def embedder_of(keys: Keys, manifest: Mapping[str, Any], device: Any, embedder: Embedder | None = None) -> Embedder:
    """What a database's keys are of. Raises `StaleArtifact` if that is not `embedder`, or not found any more."""
    embeds, _ = retriever_parts(manifest["retriever"])
    embedder = embedder or load_embedder(
        embeds or BERT, manifest["embedder"], device, manifest["trim"], manifest["precision"]
    )
    wanted = {name: embedder.manifest[name] for name in keys.embedder}
    require_match(keys.data_path / MANIFEST_FILE, keys.embedder, wanted)
    return embedder
