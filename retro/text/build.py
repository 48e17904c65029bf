"""From texts to a corpus on disk: tokens, tokenizer, and the manifest that names both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from retro.config import CorpusConfig
from retro.storage.files import atomic_write, exclusive_lock, sha256_of_file
from retro.storage.manifests import package_versions, write_manifest
from retro.text.corpus import MANIFEST_FILE, TOKENIZER_FILE, TOKENS_FILE, Corpus, DocumentEntry
from retro.text.documents import Document, find_texts, read_documents, sha256_of_text
from retro.text.split import Split, split_single, split_texts
from retro.text.tokenizer import Tokenizer, train_tokenizer


def build_corpus(
    paths: Sequence[str | Path],
    folder: str | Path,
    tokenizer: str = CorpusConfig.tokenizer,
    valid_fraction: float = CorpusConfig.valid_fraction,
    seed: int = CorpusConfig.seed,
    name: str | None = None,
) -> Corpus:
    """Read texts into a corpus folder: `tokens.bin`, `tokenizer.json`, `manifest.json`.

    * `paths` are text files and folders of them
    * `tokenizer` is `char`, `bpe:SIZE` (trained here, on the training documents), or the name or folder of any
      Hugging Face tokenizer
    * `valid_fraction` is the least share of the bytes to hold out, in whole documents; the last part of the text when
      there is only one document, as in the tutorial; 0 holds nothing out
    * `name` is what runs on this text are called; left out, the name of the file, or of the folder of all of them

    The texts are read once for each pass and one document at a time. Raises `ValueError` for text that cannot be used
    and leaves an existing corpus as it was.
    """
    folder = Path(folder)
    texts = find_texts(paths)
    split = split_texts(texts, valid_fraction, seed)
    valid = set(split.valid)

    def documents(side: str) -> Iterator[Document]:
        for document in split_single(read_documents(texts), split.single, valid_fraction):
            if (sha256_of_text(document.text) in valid) == (side == "valid"):
                yield document

    # As in the tutorial, every character of either part is in the vocabulary. A subword
    # vocabulary is learnt from the training documents alone.
    train_texts = (d.text for d in documents("train"))
    all_texts = (d.text for side in ("train", "valid") for d in documents(side))
    encoder = train_tokenizer(tokenizer, all_texts if tokenizer == "char" else train_texts)

    dtype = np.dtype("uint16" if encoder.n_tokens <= 1 << 16 else "uint32")
    entries: list[DocumentEntry] = []
    n_train = 0
    # The manifest, which knows the hashes of the other two files, comes after them.
    with exclusive_lock(folder):
        with atomic_write(folder / TOKENS_FILE) as temporary, atomic_write(folder / TOKENIZER_FILE) as mapping:
            with open(temporary, "wb") as file:
                for side in ("train", "valid"):
                    entries += write_documents(file, documents(side), encoder, dtype)
                    n_train = n_train or len(entries)
                    if not n_train:
                        raise ValueError(f"no text to train on has a token of the tokenizer {tokenizer}")
            encoder.save(mapping)
            hashes = {f"{file.name}_sha256": sha256_of_file(path) for file, path in (
                (folder / TOKENS_FILE, temporary), (folder / TOKENIZER_FILE, mapping)
            )}  # fmt: skip
        manifest = {
            **corpus_cache_key(split, tokenizer, valid_fraction, seed),
            "name": name or name_of(paths),
            "tokenizer": encoder.kind,
            "dtype": str(dtype),
            "n_train": n_train,
            "additions": [],
            "removed": [],
            **hashes,
            "versions": package_versions(),
            "documents": [list(astuple(entry)) for entry in entries],
        }
        write_manifest(folder / MANIFEST_FILE, manifest)
    return Corpus.load(folder)


def name_of(paths: Sequence[str | Path]) -> str:
    """What texts are called: a file or folder by its name, several by the folder that holds all of them."""
    whole = [Path(path).resolve() for path in paths]
    name = whole[0].stem if len(whole) == 1 else Path(os.path.commonpath(whole)).name
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip("._") or "text"


def write_documents(
    file: BinaryIO, documents: Iterable[Document], encoder: Tokenizer, dtype: np.dtype
) -> list[DocumentEntry]:
    """Append the tokens of documents to a file; returns their entries. What has no token is no document."""
    entries = []
    for document in documents:
        ids = np.asarray(encoder.encode(document.text), dtype=dtype)
        if not len(ids):
            continue  # of characters that the tokenizer drops
        file.write(ids.tobytes())
        entries.append(
            DocumentEntry(document.name, sha256_of_text(document.text), len(document.text.encode()), len(ids))
        )
    return entries


def corpus_cache_key(split: Split, tokenizer: str, valid_fraction: float, seed: int) -> dict[str, Any]:
    """The part of a corpus' manifest that tells whether it has to be built again."""
    name = tokenizer
    if (file := Path(tokenizer) / TOKENIZER_FILE).is_file():
        name = f"{Path(tokenizer).name}:{sha256_of_file(file)[:12]}"
    return {
        "texts_sha256": split.sha256,
        "tokenizer_name": name,
        "valid_fraction": valid_fraction,
        "seed": seed,
    }
