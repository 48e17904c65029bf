r"""A living database: documents added to it and taken out of it, nothing else embedded again.

The database of RETRO is apart from the model: a model trained before reads whatever is retrieved, so its database can
grow or forget without training. (The paper trains with 600 billion tokens in it and evaluates with 1.75 trillion,
section 2.1 of arXiv:2112.04426.)

Added documents lie behind all others in `tokens.bin`, so every offset stays what it was; only their chunks are
embedded, and added to the index with the centroids that it has. The chunks of a removed document leave the index;
its tokens stay in `tokens.bin`, and samples of it in the dataset, until the corpus is built again. Held-out text can
not be added. The corpus is changed first, then the index; whoever is killed in between gives the same command again.
"""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from retro import distributed
from retro.artifacts import (
    only_writer,
    read_json,
    require_match,
    sha256_of_file,
    sha256_of_json,
    write_json,
    written_whole,
)
from retro.bert_embeddings import BERTChunkEmbeddings
from retro.corpus import REPAIR, Corpus, Document, find_texts, read_documents, sha256_of_text, write_documents
from retro.database import MANIFEST_FILE, PARTS_FOLDER, build_database, keys_of, read_manifest, state_of_database
from retro.faiss_index import (
    INDEX_FILE,
    LISTS_FILE,
    Truth,
    add_rows,
    read_index,
    set_n_probe,
    take_place,
    verify_index,
    write_index,
)

MEASURE_UP_TO = 4_000_000  # keys; above, recall stays as it was measured when the index was built


def add_documents(
    paths: Sequence[str | Path],
    data_path: str | Path = "data",
    *,
    bert: BERTChunkEmbeddings | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Add texts to the database in `data_path`; returns its manifest.

    What is in it already is passed over, what was removed comes back. Raises `ValueError` for text that is
    held out, that the tokenizer cannot write, or that has the name of another document.
    """
    data_path = Path(data_path)
    with _alone(data_path):
        corpus = Corpus.load(data_path / "corpus")
        new, back = _sort_out(corpus, list(read_documents(find_texts(paths))))
        if new or back:
            _rewrite(data_path / "corpus", corpus, new, corpus.removed - set(back))
        manifest = _follow(data_path, bert, device)
    return manifest or _from_keys(data_path, bert, device)


def remove_documents(
    names: Sequence[str],
    data_path: str | Path = "data",
    *,
    bert: BERTChunkEmbeddings | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Take documents out of the database in `data_path`; returns its manifest.

    Raises `ValueError` for a name that no document of the database has, and if none would be left.
    """
    data_path = Path(data_path)
    with _alone(data_path):
        corpus = Corpus.load(data_path / "corpus")
        every = [i for part in corpus.parts for i in part]
        # Of several texts of one name, at most one is in the database: that is meant.
        numbers = {corpus.documents[i].name: i for i in [*every, *corpus.in_database]}
        for name in names:
            if name not in numbers:
                near = difflib.get_close_matches(name, numbers, n=3)
                held_out = name in [corpus.documents[i].name for i in corpus.split("valid")]
                raise ValueError(
                    f"no document of the database is called {name!r}"
                    + (", it is held out" if held_out else f"; there is {', '.join(near)}" if near else "")
                )
        removed = corpus.removed | {numbers[name] for name in names}
        if len(removed) == sum(map(len, corpus.parts)):
            raise ValueError("this would leave no document in the database; add another one first: --add TEXT")
        if removed != corpus.removed:
            _rewrite(data_path / "corpus", corpus, [], removed)
        manifest = _follow(data_path, bert, device)
    return manifest or _from_keys(data_path, bert, device)


@contextmanager
def _alone(data_path: Path) -> Iterator[None]:
    if distributed.n_processes() > 1:
        raise ValueError("a database is changed by one process; run --add and --remove without torchrun")
    with only_writer(data_path):
        yield


def _sort_out(corpus: Corpus, documents: list[Document]) -> tuple[list[Document], list[int]]:
    """The documents that are new, and the numbers of those that come back."""
    held_out = {corpus.documents[i].sha256: corpus.documents[i].name for i in corpus.split("valid")}
    known = {corpus.documents[i].sha256: i for part in corpus.parts for i in part}
    names = {corpus.documents[i].name for i in corpus.in_database}
    new: dict[str, Document] = {}
    back = []
    for document in documents:
        sha256 = sha256_of_text(document.text)
        if sha256 in held_out:
            raise ValueError(f"{document.name} has the text of {held_out[sha256]}, which is held out; leave it out")
        number = known.get(sha256)
        if number is not None and number not in corpus.removed:
            continue
        if (document.name if number is None else corpus.documents[number].name) in names:
            raise ValueError(
                f"the database has another text by the name of {document.name}; take that out first "
                f"(python -m retro.database --remove {document.name}), or rename the file"
            )
        if number is None:
            new[sha256] = document
        else:
            back.append(number)
    return list(new.values()), back


def _rewrite(folder: Path, corpus: Corpus, new: list[Document], removed: frozenset[int] | set[int]) -> None:
    """Write a corpus with documents behind those it has, and with others marked as removed."""
    manifest = corpus.made_with | {"removed": sorted(removed)}
    with only_writer(folder):
        # Nobody has written a corpus there, or damaged this one, since it was read.
        now = {"sha256": sha256_of_json(read_json(folder / "manifest.json", REPAIR))}
        require_match(folder / "manifest.json", now, {"sha256": sha256_of_json(corpus.made_with)}, REPAIR)
        if new:
            with written_whole(folder / "tokens.bin") as temporary:
                shutil.copyfile(folder / "tokens.bin", temporary)
                with open(temporary, "r+b") as file:
                    file.truncate(corpus.tokens.nbytes)  # behind them may lie what another addition left
                    found = {"sha256": sha256_of_file(temporary)}
                    require_match(folder / "tokens.bin", found, {"sha256": manifest["tokens.bin_sha256"]}, REPAIR)
                    file.seek(0, os.SEEK_END)
                    entries = write_documents(file, new, corpus.tokenizer, corpus.tokens.dtype)
                manifest |= {
                    "tokens.bin_sha256": sha256_of_file(temporary),
                    "additions": [*corpus.additions, *([len(entries)] if entries else [])],
                    "documents": manifest["documents"] + [[e.name, e.sha256, e.n_bytes, e.n_tokens] for e in entries],
                }
        write_json(folder / "manifest.json", manifest)


def _follow(data_path: Path, bert: BERTChunkEmbeddings | None, device: torch.device | str) -> dict[str, Any] | None:
    """Bring the index to where the corpus is; None if it is of a kind that cannot forget."""
    corpus, manifest = Corpus.load(data_path / "corpus"), read_manifest(data_path)
    if manifest["database_sha256"] == corpus.database_sha256:
        take_place(data_path, manifest)
        return manifest
    bert = bert or BERTChunkEmbeddings(device, manifest["embedder"], manifest["trim"], manifest["precision"])
    require_match(data_path / MANIFEST_FILE, manifest, {"corpus_sha256": corpus.sha256}, REPAIR)
    keys = keys_of(data_path, corpus, manifest)
    keys.compute(bert)
    was_removed = set(map(int, manifest["removed"]))
    added = {i for part in corpus.parts[len(manifest["additions"]) + 1 :] for i in part}
    come, gone = (added | was_removed) - corpus.removed, corpus.removed - was_removed - added
    if gone and manifest["lists_sha256"]:
        return None  # FAISS takes a list on disk that shrinks to be free, and writes over others: 1.15.1
    index = _writable(data_path, manifest)
    set_n_probe(index, manifest["n_probe"])
    document_of = corpus.document_of(keys.offsets)
    if gone:
        try:
            index.remove_ids(keys.offsets[np.isin(document_of, list(gone))])
        except RuntimeError:  # as an HNSW graph
            return None
    numbers = np.flatnonzero(np.isin(document_of, list(come)))
    if len(numbers):
        add_rows(index, keys.rows(numbers), keys.offsets[numbers])
    manifest |= state_of_database(corpus) | {"n_chunks": index.ntotal}
    if len(keys.offsets) <= MEASURE_UP_TO:
        manifest["recall"] = Truth.of(keys, manifest["seed"]).recall(index, keys)
    manifest |= write_index(index, data_path)
    write_json(data_path / MANIFEST_FILE, manifest)
    take_place(data_path, manifest)
    shutil.rmtree(data_path / PARTS_FOLDER, ignore_errors=True)
    return manifest


def _writable(data_path: Path, manifest: dict[str, Any]) -> faiss.Index:
    """The index in memory; if its lists are on disk, a copy of them, so that the old ones stay until all is done."""
    if not manifest["lists_sha256"]:
        return read_index(data_path, manifest, REPAIR, writable=True)
    verify_index(data_path, manifest, REPAIR)
    copy = data_path / PARTS_FOLDER
    copy.mkdir(exist_ok=True)
    for name in (INDEX_FILE, LISTS_FILE):
        shutil.copyfile(data_path / name, copy / name)
    return read_index(copy, manifest, REPAIR, writable=True)


def _from_keys(data_path: Path, bert: BERTChunkEmbeddings | None, device: torch.device | str) -> dict[str, Any]:
    """Build the index anew from the keys, which are all there."""
    manifest = read_manifest(data_path)
    bert = bert or BERTChunkEmbeddings(device, manifest["embedder"], manifest["trim"], manifest["precision"])
    search, wanted = manifest["search"], manifest["index_wanted"]
    options: dict[str, Any] = {"n_probe": int(search)} if search >= 1 else {"n_probe": None, "recall": search}
    return build_database(
        manifest["chunk_len"], data_path=data_path, index=wanted, bert=bert, seed=manifest["seed"], **options
    )
