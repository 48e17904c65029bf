"""From texts to a corpus on disk: tokens, tokenizer, and the manifest that names both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from retro.config import CorpusConfig
from retro.progress import note
from retro.storage.files import atomic_write, exclusive_lock, remove_unfinished, sha256_of_file
from retro.storage.manifests import package_versions, write_manifest
from retro.text.copies import first_of_equals
from retro.text.corpus import (
    MANIFEST_FILE,
    SIGNATURES_FILE,
    TOKENIZER_FILE,
    TOKENS_FILE,
    Corpus,
    DocumentEntry,
    documents_file,
    sha256_of_corpus,
)
from retro.text.documents import Document, find_texts, read_documents
from retro.text.in_shards import Found, InShards
from retro.text.records import Columns
from retro.text.split import SIGNATURES_FOLDER, Split, cut_in_two, require_text, split_texts
from retro.text.spool import Spool
from retro.text.table import Documents, write_table
from retro.text.tokenizer import Tokenizer, lost_text, train_tokenizer

TOKENS_FOLDER = "tokens.shards"  # while there is more to tokenize
LEARNT_FROM = 1 << 26  # characters that a subword vocabulary is learnt from, where there are more
COLUMNS = ("text_column", "name_column")  # of CorpusConfig


def build_corpus(
    paths: Sequence[str | Path],
    folder: str | Path,
    tokenizer: str = CorpusConfig.tokenizer,
    valid_fraction: float = CorpusConfig.valid_fraction,
    seed: int = CorpusConfig.seed,
    name: str | None = None,
    keep_near_held_out: bool = CorpusConfig.keep_near_held_out,
    hold_out: Literal["documents", "folders"] = CorpusConfig.hold_out,
    text_column: str = CorpusConfig.text_column,
    name_column: str | None = CorpusConfig.name_column,
) -> Corpus:
    """Read texts into a corpus folder: tokens, tokenizer, signatures, a table of documents, and a manifest.

    * `paths` are text files, files of many texts, datasets, and folders of them (`retro.text.documents`)
    * `tokenizer` is `char`, `bpe:SIZE` (trained here, on the training documents), or the name or folder of any
      Hugging Face tokenizer
    * `valid_fraction` is the least share of the bytes to hold out, in whole documents; the last part of the text when
      there is only one document, as in the tutorial; 0 holds nothing out
    * `name` is what runs on this text are called; left out, the name of the file, or of the folder of all of them
    * `keep_near_held_out` trains on documents that are near-duplicates of held-out ones; they are left out otherwise
    * `hold_out` is what is held out as a whole: `documents`, or the `folders` that their names tell

    * `text_column`, `name_column` are the fields of records, and the columns of Parquet files and datasets, in which
      their text is, and what they are called

    The texts are read once, one at a time, into a file without a name beside the corpus; what comes afterwards takes
    them from there. Raises `ValueError` for text that cannot be used and leaves an existing corpus as it was.
    """
    folder = Path(folder)
    config = CorpusConfig(tokenizer, valid_fraction, hold_out, keep_near_held_out, seed, text_column, name_column)
    texts = find_texts(paths)
    with Spool(read_documents(texts, Columns(text_column, name_column)), folder) as documents:
        require_text(documents, texts)
        with exclusive_lock(folder):
            split = split_texts(documents, valid_fraction, seed, keep_near_held_out, hold_out, folder)
            parts = cut_in_two(documents[0], valid_fraction) if split.single else documents
            _write_corpus(parts, split, folder, config, name or name_of(paths))
    remove_unfinished(folder, *unfinished(folder))
    return Corpus.load(folder)


def unfinished(folder: Path) -> list[Path]:
    """Where a corpus has what is finished while there is more to do."""
    return [folder / SIGNATURES_FOLDER, folder / TOKENS_FOLDER]


def _write_corpus(documents: Sequence[Document], split: Split, folder: Path, config: CorpusConfig, name: str) -> None:
    """Write the corpus of documents that are held out as `split` says. For who holds the folder's lock."""
    train, valid = ([i for i, of in enumerate(split.sides) if of == side] for side in ("train", "valid"))

    # As in the tutorial, every character of either part is in the vocabulary. A subword
    # vocabulary is learnt from the training documents alone.
    learnt_from = [*train, *(valid if config.tokenizer == "char" else ())]
    encoder = train_tokenizer(config.tokenizer, _texts_to_learn_from(documents, learnt_from, config))

    # Near-duplicates follow each other: what a query may not retrieve is then one range of offsets.
    train = [train[place] for place in np.argsort(first_of_equals(split.groups[train]), kind="stable")]
    dtype = np.dtype("uint16" if encoder.n_tokens <= 1 << 16 else "uint32")
    # The manifest, which knows the hashes of the other files, comes after them.
    with (
        atomic_write(folder / TOKENS_FILE) as tokens,
        atomic_write(folder / TOKENIZER_FILE) as mapping,
        atomic_write(folder / SIGNATURES_FILE) as signatures,
    ):
        with open(tokens, "wb") as file:
            written = write_tokens(file, documents, split.found, [*train, *valid], encoder, dtype, folder)
        numbers, entries = [*written], [*written.values()]
        if not (n_train := sum(split.sides[number] == "train" for number in numbers)):
            raise ValueError(f"no text to train on has a token of the tokenizer {config.tokenizer}")
        split.signatures[numbers].tofile(signatures)
        encoder.save(mapping)
        files = {TOKENS_FILE: tokens, TOKENIZER_FILE: mapping, SIGNATURES_FILE: signatures}
        hashes = {f"{name}_sha256": sha256_of_file(path) for name, path in files.items()}
    hashes |= replace_table(folder, entries, first_of_equals(split.groups[numbers]))
    manifest = {
        **corpus_cache_key(split.sha256, config),
        "name": name,
        "text_column": config.text_column,
        "name_column": config.name_column,
        "tokenizer": encoder.kind,
        "dtype": str(dtype),
        "n_train": n_train,
        "n_documents": len(entries),
        "sha256": sha256_of_corpus(entries, n_train, encoder),
        "additions": [],
        "removed": [],
        **hashes,
        "versions": package_versions(),
        "left_out": [list(pair) for pair in split.left_out],
    }
    write_manifest(folder / MANIFEST_FILE, manifest)
    remove_other_tables(folder, manifest)


def write_tokens(
    file: BinaryIO,
    documents: Sequence[Document],
    found: Found,
    numbers: Sequence[int],
    encoder: Tokenizer,
    dtype: np.dtype,
    folder: Path,
) -> dict[int, DocumentEntry]:
    """Append the tokens of documents to a file; returns the entries of those that have any, by their numbers.

    * `found` are all documents, `numbers` those that are written, in their order
    * `folder` takes what is finished while there is more to do, for who holds its lock
    """
    tokenized = InShards(
        folder / TOKENS_FOLDER, {"tokenizer_sha256": encoder.sha256, "dtype": str(dtype)}, found, numbers
    )
    tokenized.compute("Tokenize", documents, _Tokenizing(encoder, dtype))
    entries = dict[int, DocumentEntry]()
    for batch, (tokens, lengths) in tokenized.arrays(2):
        file.write(tokens.data)
        entries |= {i: DocumentEntry(*found[i], n) for i, n in zip(batch, lengths.tolist(), strict=True) if n}
    return entries


class _Tokenizing:
    """Makes tokens of documents, and tells of the first one that they do not give back."""

    def __init__(self, encoder: Tokenizer, dtype: np.dtype) -> None:
        self.encoder, self.dtype, self.told = encoder, dtype, False

    def __call__(self, documents: list[Document]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of documents, one behind the other, and how many each has."""
        arrays = self.encoder.encode_batch([document.text for document in documents])
        for document, ids in zip(documents, arrays, strict=True):
            if not self.told and (lost := lost_text(self.encoder, document.text, ids)):
                self.told = True
                note(
                    f"The tokenizer does not keep all of the text: in {document.name}, {lost}. Bits per byte of models "
                    f"of this corpus cannot be compared with those of other tokenizers."
                )
        return np.concatenate(arrays).astype(self.dtype), np.array([len(ids) for ids in arrays])


def replace_table(
    folder: Path, entries: Sequence[DocumentEntry], groups: np.ndarray, before: Documents | None = None
) -> dict[str, str]:
    """Write the table of documents of a manifest that is to be written; returns its hash, as that says it.

    The one of the manifest that is there stays beside it. Arguments are those of `write_table`.
    """
    with atomic_write(folder / "documents.bin") as table:
        write_table(table, entries, groups, before)
        named = {"documents_sha256": sha256_of_file(table)}
    os.replace(folder / "documents.bin", folder / documents_file(named))
    return named


def remove_other_tables(folder: Path, manifest: dict[str, Any]) -> None:
    """Remove the tables of documents that a manifest does not speak of."""
    for table in set(folder.glob("documents*.bin")) - {folder / documents_file(manifest)}:
        table.unlink()


def name_of(paths: Sequence[str | Path]) -> str:
    """What texts are called: a file or folder by its name, several by the folder that holds all of them."""
    whole = [Path(path).resolve() for path in paths]
    name = whole[0].stem if len(whole) == 1 else Path(os.path.commonpath(whole)).name
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip("._") or "text"


def _texts_to_learn_from(documents: Sequence[Document], numbers: list[int], config: CorpusConfig) -> Iterator[str]:
    """The texts of documents with these numbers; for subwords, if they are longer, `LEARNT_FROM` characters of them.

    Which these are, is drawn by the seed.
    """
    if config.tokenizer == "char":
        yield from (documents[number].text for number in numbers)
        return
    left = LEARNT_FROM
    for place in np.random.default_rng(config.seed).permutation(len(numbers)):
        text = documents[numbers[place]].text[:left]
        left -= len(text)
        yield text
        if not left:
            return


def corpus_cache_key(texts_sha256: str, config: CorpusConfig) -> dict[str, Any]:
    """The part of a corpus' manifest that tells whether it has to be built again."""
    name = config.tokenizer
    if (file := Path(name) / TOKENIZER_FILE).is_file():
        name = f"{Path(name).name}:{sha256_of_file(file)[:12]}"
    # What the columns are shows in the texts that are read from them.
    others = {key: value for key, value in asdict(config).items() if key not in ("tokenizer", *COLUMNS)}
    return {"texts_sha256": texts_sha256, "tokenizer_name": name, **others}
