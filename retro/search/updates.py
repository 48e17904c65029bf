r"""Updates: documents added to a database and taken out of it, nothing else embedded again.

The database of RETRO is apart from the model: a model trained before reads whatever is retrieved, so its database can
grow or forget without training. (The paper trains with 600 billion tokens in it and evaluates with 1.75 trillion,
section 2.1 of arXiv:2112.04426.)

Added documents lie behind all others in `tokens.bin`, so every offset stays what it was; only their chunks are
embedded, and added to the index with the centroids that it has. The chunks of a removed document leave the index;
its tokens stay in `tokens.bin`, and samples of it in the dataset, until the corpus is built again. Held-out text can
not be added. The corpus is changed first, then the index; after a crash in between, the same command finishes both.
"""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np
import torch

from retro import parallel
from retro.config import retriever_parts
from retro.errors import EmptyDatabase, NameTaken, SeenText, require_match
from retro.search.building import (
    SHARDS_FOLDER,
    build_from_keys,
    config_of_database,
    documents_in_database,
    embedder_of,
    files_beside,
    without_index,
)
from retro.search.factory import set_n_probe
from retro.search.filling import add_rows
from retro.search.index_file import (
    INDEX_FILE,
    LISTS_FILE,
    MANIFEST_FILE,
    promote_new_index,
    read_database_manifest,
    read_index,
    verify_index,
    write_database,
)
from retro.search.keys import Keys
from retro.search.recall import ExactNeighbors
from retro.search.retrievers import Retriever
from retro.search.sentences import Embedder
from retro.storage.files import exclusive_lock, naming_what_cannot_be_written, remove_unfinished, sha256_of_file
from retro.storage.manifests import read_manifest, sha256_of_json, write_manifest
from retro.text import corpus as corpus_files
from retro.text.build import remove_other_tables, replace_table, unfinished, write_tokens
from retro.text.copies import are_near, first_of_equals, groups_of, near, signatures_of
from retro.text.corpus import CORPUS_FOLDER, SIGNATURES_FILE, TOKENS_FILE, Corpus
from retro.text.documents import Document, find_texts, read_documents, sha256_of_text
from retro.text.records import Columns
from retro.text.split import entry_of
from retro.text.table import Documents

# Recall is measured again, which takes seconds with a million keys, once so large a share of them has changed, and up
# to so many; else it stays as it was measured.
LARGE_CHANGE, MEASURE_UP_TO = 0.01, 4_000_000


def add_documents(
    paths: Sequence[str | Path],
    data_path: str | Path = "data",
    *,
    bert: Embedder | None = None,
    device: torch.device | str = "cpu",
    retriever: Retriever | None = None,
) -> dict[str, Any]:
    """Add texts to the database in `data_path`; returns its manifest.

    * `bert` embeds them, `retriever` is what finds them; left out, those that the database was built with

    What is in it already is passed over, what was removed comes back. Raises `SeenText` for text near to what is held
    out, `NameTaken` for another version of a document that is there, `ValueError` for what the tokenizer cannot write.
    """
    data_path = Path(data_path)
    with _one_process(data_path):
        corpus = Corpus.load(data_path / CORPUS_FOLDER)
        _require_retriever(data_path, corpus, retriever)
        new, restored = split_new_and_restored(
            corpus, list(read_documents(find_texts(paths), Columns.of(corpus.manifest)))
        )
        if new or restored:
            _rewrite(data_path / CORPUS_FOLDER, corpus, new, corpus.removed - set(restored))
        remove_unfinished(data_path / CORPUS_FOLDER, *unfinished(data_path / CORPUS_FOLDER))
        manifest = update_index(data_path, bert, device, retriever)
    return manifest or _rebuild(data_path, bert, device)


def remove_documents(
    names: Sequence[str],
    data_path: str | Path = "data",
    *,
    bert: Embedder | None = None,
    device: torch.device | str = "cpu",
    retriever: Retriever | None = None,
) -> dict[str, Any]:
    """Take documents out of the database in `data_path`; returns its manifest.

    * `names` are those of documents; `FILE.jsonl` names all records of it, `FOLDER/` all documents below it

    Raises `ValueError` for a name that no document of the database has, or that means more than one of these, and if
    none would be left.
    """
    data_path = Path(data_path)
    with _one_process(data_path):
        corpus = Corpus.load(data_path / CORPUS_FOLDER)
        _require_retriever(data_path, corpus, retriever)
        every = [i for part in corpus.parts for i in part]
        # Of several texts of one name, at most one is in the database: that is meant.
        numbers = {corpus.documents[i].name: i for i in [*every, *corpus.in_database]}
        records, removed = _records(numbers), set(corpus.removed)
        for name in names:
            if not (meant := _meant(name, numbers, records)):
                near = difflib.get_close_matches(name, numbers, n=3)
                held_out = [corpus.documents[i].name for i in corpus.split("valid")]
                is_held_out = _meant(name, held_out, _records(held_out))
                raise ValueError(
                    f"no document of the database is called {name!r}"
                    + (", it is held out" if is_held_out else f"; there is {', '.join(near)}" if near else "")
                )
            removed |= {numbers[n] for n in meant}
        if len(removed) == sum(map(len, corpus.parts)):
            raise EmptyDatabase("this would leave no document in the database; add another one first")
        if removed != corpus.removed:
            _rewrite(data_path / CORPUS_FOLDER, corpus, [], removed)
        manifest = update_index(data_path, bert, device, retriever)
    return manifest or _rebuild(data_path, bert, device)


def _require_retriever(data_path: Path, corpus: Corpus, retriever: Retriever | None) -> None:
    """Raise `InvalidOption`, before anything is changed, where a database is of a retriever that is not there."""
    if (data_path / MANIFEST_FILE).exists():
        files_beside(data_path, corpus, read_database_manifest(data_path), retriever)


def _records(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of the records of each file, `FILE.jsonl:LINE`."""
    found: dict[str, list[str]] = {}
    for name in names:
        file, _, line = name.rpartition(":")
        if line.isdecimal():
            found.setdefault(file, []).append(name)
    return found


def _meant(name: str, names: Collection[str], records: Mapping[str, list[str]]) -> list[str]:
    """What a name means of the `names`: one of them, the records of a file, or all below a folder; [] for nothing."""
    below = [n for n in names if n.startswith(name)] if name.endswith("/") else []
    meant = [some for some in ([name] * (name in names), records.get(name, []), below) if some]
    if len(meant) > 1:
        raise ValueError(f"{name!r} is the name of a document, and of others besides: {', '.join(meant[1][:3])}")
    return meant[0] if meant else []


@contextmanager
def _one_process(data_path: Path) -> Iterator[None]:
    if parallel.n_processes() > 1:
        raise ValueError("a database is changed by one process; add and remove without torchrun")
    with exclusive_lock(data_path):
        yield


def split_new_and_restored(corpus: Corpus, documents: list[Document]) -> tuple[list[Document], list[int]]:
    """The documents that are new, and the numbers of those that were removed and come back.

    A new one with the name of another that is in the database is named `NAME (2)`, and so on, unless it is a version of
    that one. Raises `SeenText` for a document near to one that is held out, `NameTaken` for another version of one.
    """
    known = {corpus.documents[i].sha256: i for part in corpus.parts for i in part}
    names = {corpus.documents[i].name: i for i in corpus.in_database}  # and -1 for those that come now
    new: dict[str, Document] = {}
    restored = set[int]()
    signatures, (held_out, theirs) = signatures_of(d.text for d in documents), corpus.held_out_signatures
    alike = near(signatures, theirs)
    for document, signed, copies in zip(documents, signatures, alike, strict=True):
        sha256 = sha256_of_text(document.text)
        if copies:
            held_out_name = corpus.documents[held_out[copies[0]]].name
            raise SeenText(f"{document.name} is {held_out_name}, or nearly, which is held out; leave it out")
        number = known.get(sha256)
        if sha256 in new or number in restored or (number is not None and number not in corpus.removed):
            continue
        name = document.name if number is None else corpus.documents[number].name
        other = names.get(name, -1)
        if name in names and (number is not None or (other >= 0 and are_near(signed, corpus.signatures[other]))):
            raise NameTaken(name)
        if number is not None:
            restored.add(number)
        else:
            name = _free_name(name, names)
            new[sha256] = Document(name, document.text)
        names[name] = -1
    return list(new.values()), sorted(restored)


def _free_name(name: str, names: Container[str]) -> str:
    return next(free for free in chain([name], (f"{name} ({n})" for n in count(2))) if free not in names)


def _rewrite(folder: Path, corpus: Corpus, new: list[Document], removed: frozenset[int] | set[int]) -> None:
    """Write a corpus with documents behind those it has, and with others marked as removed."""
    manifest, path = corpus.manifest | {"removed": sorted(removed)}, folder / corpus_files.MANIFEST_FILE
    with exclusive_lock(folder):
        # Nobody has written a corpus there, or damaged this one, since it was read.
        require_match(
            path, {"sha256": sha256_of_json(read_manifest(path))}, {"sha256": sha256_of_json(corpus.manifest)}
        )
        if new:
            # Near-duplicates follow each other, as in the corpus: what a query may not retrieve is then one range.
            signs = np.concatenate([corpus.signatures, signatures_of(document.text for document in new)])
            n, groups = len(corpus.documents), groups_of(signs, corpus.groups)
            order = np.argsort(groups[n:], kind="stable").tolist()
            tokens_file, signatures_file = folder / TOKENS_FILE, folder / SIGNATURES_FILE
            with _appended(tokens_file, corpus.tokens.nbytes) as file:
                found = [entry_of(document) for document in new]
                written = write_tokens(file, new, found, order, corpus.tokenizer, corpus.tokens.dtype, folder)
            numbers = [*range(n), *(n + i for i in written)]
            with _appended(signatures_file, corpus.signatures.nbytes) as file:
                signs[numbers[n:]].tofile(file)
            manifest |= {
                f"{TOKENS_FILE}_sha256": sha256_of_file(tokens_file),
                f"{SIGNATURES_FILE}_sha256": sha256_of_file(signatures_file),
                "additions": [*corpus.additions, *([len(written)] if written else [])],
                "n_documents": len(numbers),
            }
            assert isinstance(corpus.documents, Documents)
            of_new = [*written.values()]
            manifest |= replace_table(folder, of_new, first_of_equals(groups[numbers]), corpus.documents)
        write_manifest(path, manifest)
        remove_other_tables(folder, manifest)


@contextmanager
def _appended(file: Path, n_bytes: int) -> Iterator[BinaryIO]:
    """A corpus' file, open to append to its first `n_bytes`; behind them may lie what a killed call left.

    Who has the corpus open, or opens it before its manifest speaks of what is appended, reads these first ones alone.
    """
    with naming_what_cannot_be_written(file), open(file, "r+b") as opened:
        opened.truncate(n_bytes)
        opened.seek(0, os.SEEK_END)
        yield opened
        opened.flush()
        os.fsync(opened.fileno())


def update_index(
    data_path: Path, bert: Embedder | None, device: torch.device | str, retriever: Retriever | None = None
) -> dict[str, Any] | None:
    """Bring what finds chunks to where the corpus is; None if the FAISS index is of a kind that cannot forget.

    What finds them otherwise is built anew: what BM25 says of one chunk depends on all.
    """
    corpus, manifest = Corpus.load(data_path / CORPUS_FOLDER), read_database_manifest(data_path)
    files = files_beside(data_path, corpus, manifest, retriever)
    embeds, _ = retriever_parts(manifest["retriever"])
    if manifest["database_sha256"] == corpus.database_sha256:
        if embeds:
            promote_new_index(data_path, manifest)
        return manifest
    require_match(data_path / MANIFEST_FILE, manifest, {"corpus_sha256": corpus.sha256})
    if files is not None:
        files.build()
    if embeds:
        manifest_or_none = _update_keys(data_path, corpus, manifest, bert, device)
    else:
        assert files is not None
        manifest_or_none = manifest | without_index(files)
        write_manifest(data_path / MANIFEST_FILE, manifest_or_none)
    if files is not None:
        files.remove_others()
    return manifest_or_none


def _update_keys(
    data_path: Path, corpus: Corpus, manifest: dict[str, Any], bert: Embedder | None, device: torch.device | str
) -> dict[str, Any] | None:
    """As `update_index`, of the keys and the FAISS index over them."""
    keys = Keys(data_path, corpus, manifest["chunk_len"], manifest)
    bert = embedder_of(keys, manifest, device, bert)
    keys.compute(bert)
    was_removed = set(map(int, manifest["removed"]))
    added = {i for part in corpus.parts[len(manifest["additions"]) + 1 :] for i in part}
    to_add, to_remove = (added | was_removed) - corpus.removed, corpus.removed - was_removed - added
    if to_remove and manifest["lists_sha256"]:
        return None  # FAISS takes a list on disk that shrinks to be free, and writes over others: 1.15.1
    index = _writable_index(data_path, manifest)
    n_before = index.ntotal
    set_n_probe(index, manifest["n_probe"])
    if to_remove:
        try:
            index.remove_ids(keys.offsets[keys.offsets.of_documents(to_remove)])
        except RuntimeError:  # as an HNSW graph
            return None
    numbers = keys.offsets.of_documents(to_add)
    n_changed = manifest["n_changed"] + n_before - index.ntotal + len(numbers)
    if len(numbers):
        add_rows(index, keys.rows(numbers), keys.offsets[numbers])
    manifest |= documents_in_database(corpus) | {"n_chunks": index.ntotal, "n_changed": n_changed}
    if len(keys.offsets) <= MEASURE_UP_TO and n_changed >= LARGE_CHANGE * index.ntotal:
        recall = ExactNeighbors.of(keys, bert, manifest["seed"]).recall(index, keys)
        manifest |= {"recall": recall, "n_changed": 0}
    manifest = write_database(index, data_path, manifest)
    shutil.rmtree(data_path / SHARDS_FOLDER, ignore_errors=True)
    return manifest


def _writable_index(data_path: Path, manifest: dict[str, Any]) -> faiss.Index:
    """The index in memory; if its lists are on disk, a copy of them, so that the old ones stay until all is done."""
    if not manifest["lists_sha256"]:
        return read_index(data_path, manifest, writable=True)
    verify_index(data_path, manifest)
    copy = data_path / SHARDS_FOLDER
    copy.mkdir(exist_ok=True)
    for name in (INDEX_FILE, LISTS_FILE):
        shutil.copyfile(data_path / name, copy / name)
    return read_index(copy, manifest, writable=True)


def _rebuild(data_path: Path, bert: Embedder | None, device: torch.device | str) -> dict[str, Any]:
    """Build the index anew from the keys, which are all there."""
    corpus, manifest = Corpus.load(data_path / CORPUS_FOLDER), read_database_manifest(data_path)
    keys = Keys(data_path, corpus, manifest["chunk_len"], manifest)
    return build_from_keys(keys, embedder_of(keys, manifest, device, bert), config_of_database(manifest), data_path)
